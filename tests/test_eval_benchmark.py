"""--benchmark: what it trains, what it keeps, what it then evaluates. The training itself is not run here."""
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import eval_benchmark
import pytest
import torch
import tyro
from conftest import ROOT
from safetensors.torch import save_file

import eval as ev
import shielddiff as sd


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Those that are run, in an empty folder: each leaves the weights that it would."""
    said = []

    def run(commands, threads=0, beside=()):
        for command in commands:
            said.append(command)
            out = Path(command[command.index("--out") + 1])
            lora = Path(command[0]).stem in ("shielddiff", "duo")
            put(out / eval_benchmark.WEIGHTS["lora" if lora else "unet"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_benchmark, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # nothing beside them
    return said


def prepared(*flags, model=str(ROOT / "tests/tiny")):
    args = ev.parse_args(["--model", model, "--benchmark", *flags])
    names = [entry.partition("=")[0] for entry in (*args.lora, *args.method)]
    return eval_benchmark.train(eval_benchmark.plan(args, tuple(ev.METHODS), names), None)


def parsed(commands):
    """{OUT's name: the arguments of its script} of all commands but the first, which is ours."""
    return {Path(flags[flags.index("--out") + 1]).name: tyro.cli(
        importlib.import_module(Path(script).stem).Args, args=flags) for script, *flags in commands[1:]}


def test_on_stable_diffusion_the_rivals_know_nudity_and_the_clothed_picture(commands, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/rivals"))
    assert prepared(model="some/sd").lora[0] == "ShieldDiff=runs/sd-0"
    found = parsed(commands)
    assert set(found) == {f"{name}-sd" for name in eval_benchmark.RIVALS}
    for name in ("esd-guided-sd", "sdd-guided-sd"):
        assert found[name].concept == "a woman, a man, a person" and found[name].toward == "{}, fully clothed"
    assert found["esd-guided-sd"].erase_from == "{}" and found["duo-sd"].prior == 5e6
    assert found["esd-u-sd"].toward == found["sdd-sd"].toward == "" and found["uce-sd"].lam == 0.5
    assert found["uce-guided-sd"].edits == "guided" and found["uce-sd"].edits == "naive"


def test_what_is_missing_is_trained_by_a_command_that_its_script_takes(commands, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/rivals"))  # as for a script that is run there
    args = prepared("--method", "crops", "mine=a.py:f", "--lora", "theirs=b.safetensors")
    assert len(commands) == 1 + len(eval_benchmark.RIVALS)
    for script, *flags in commands:
        assert Path(script).is_file()
        tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags)
    found, nouns = parsed(commands), "an astronaut, a woman in a spacesuit, a space pilot"
    for name, erase, edits in (("uce", 100, "naive"), ("uce-guided", 0.1, "guided")):  # RESULTS.md's
        assert (found[name].erase, found[name].lam, found[name].edits) == (erase, 0.05, edits)
    for name, rate in (("esd-guided", 1e-4), ("sdd-guided", 3e-4)):
        of = found[name]
        assert (of.learning_rate, of.concept, of.toward) == (rate, nouns, "{}, face hidden")
    assert found["esd-guided"].erase_from == "{}" and found["esd-u"].erase_from == found["sdd"].toward == ""
    methods = [method for method in ev.METHODS if method not in eval_benchmark.LEFT_OUT]
    assert args.method == (*methods, "mine=a.py:f") and args.lora[-1] == "theirs=b.safetensors"
    assert args.attack == ("ring-a-bell", "unlearndiffatk", "cce", "revival")
    assert args.prompts == tuple(str(ROOT / "tests/tiny" / f) for f in ("prompts_heldout.txt", "prompts.txt"))
    args.lora, args.method = args.lora[:-1], args.method[:-1]
    assert [s.name for s in ev.list_systems(args)] == [
        "base", "ShieldDiff", "duo", "esd-u", "esd-guided", "sdd", "sdd-guided", "safegen", "uce",
        "uce-guided", *methods]


@pytest.mark.parametrize(("flags", "words"), [
    (("--prompts", "nowhere.txt"), "cannot read prompt file nowhere.txt"),
    (("--lora", "nowhere"), "--lora nowhere"), (("--lora", "x/duo"), "of its own called duo"),
    (("--lora", "mine=x/duo"), "cannot load --lora x/duo"), (("--steps", "1001"), "1001 --steps"),
    (("--method", "pno=own.py:f"), "of its own called pno"),
    (("--method", "mine=own.py:bare"), "bare lacks @contextmanager"),
    (("--clip-model", "no/clip"), "no/clip")])
def test_what_cannot_be_read_is_refused_before_hours_of_training(flags, words, commands, capsys):
    Path("own.py").write_text("def f(pipe, spec, stock): ...\ndef bare(pipe, spec, stock): yield stock\n")
    file = Path("x/duo") / eval_benchmark.WEIGHTS["lora"]
    file.parent.mkdir(parents=True)
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(SystemExit) as stop:
        ev.evaluate(ev.parse_args(["--model", str(ROOT / "tests/tiny"), "--benchmark", *flags]))
    assert stop.value.code == 2 and words in capsys.readouterr().err and not commands


@pytest.mark.parametrize("checkpoint", ["checkpoint.pt", "checkpoint-before.pt"])  # alone after a full disk
def test_what_is_there_is_kept_and_a_stopped_run_of_ours_resumed(checkpoint, commands, capsys):
    prepared()
    commands.clear()
    ours = Path("runs/tiny-0")
    (ours / "args.json").write_text(json.dumps(dict(steps=2)))
    (ours / "metrics.jsonl").write_text("{}\n")
    put(ours / checkpoint)
    os.utime(ours / eval_benchmark.WEIGHTS["lora"])
    prepared()
    assert commands == [[f"{ROOT}/shielddiff.py", "--model", str(ROOT / "tests/tiny"), "--out", str(ours),
                         "--resume"]]
    commands.clear()
    (ours / "metrics.jsonl").write_text("{}\n{}\n")
    os.utime(ours / eval_benchmark.WEIGHTS["lora"], (1, 1))  # of the step before
    prepared()
    assert len(commands) == 1
    os.utime(ours / "metrics.jsonl", (1, 1))
    capsys.readouterr()
    prepared()
    assert len(commands) == 1
    assert "runs/tiny-0 is there, by an older version, of 2 steps: delete it" in capsys.readouterr().out
    for changes, more in ({}, ""), (
            dict(nudity_weight=0.0, seed=3), ", with seed 3, not 0, with nudity_weight 0.0, not 1.0"):
        written = dataclasses.asdict(sd.Args(**sd.TINY | dict(steps=2) | changes))
        (ours / "args.json").write_text(json.dumps(written | dict(prompts=[["a", "a", True]])))
        prepared()
        assert len(commands) == 1
        said = capsys.readouterr().out
        assert f"runs/tiny-0 is there, of 2 steps{more}: delete it" in said and "uce is there: delete" in said


@pytest.mark.parametrize(("folder", "file"), [("runs/tiny-0", "args.json"),
                                              ("runs/rivals/uce", "training.json")])
@pytest.mark.parametrize("content", ["{", "3"])
def test_a_damaged_record_of_a_training_is_named(folder, file, content, commands, capsys):
    prepared()
    (Path("runs/tiny-0") / "metrics.jsonl").write_text("")
    (Path(folder) / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        prepared()
    assert stop.value.code == 2 and f"cannot read {folder}/{file} (damaged?" in capsys.readouterr().err


def test_a_prompt_file_that_is_named_and_its_own_is_evaluated_once(commands, monkeypatch):
    own = Path(sd.TINY["prompts"]).resolve()
    monkeypatch.chdir(own.parent)
    args = ev.parse_args(["--model", str(ROOT / "tests/tiny"), "--benchmark", "--prompts", own.name])
    assert [Path(p).resolve() for p in eval_benchmark.plan(args, tuple(ev.METHODS), []).prompts] == [own]


def test_two_models_of_a_hub_that_are_called_alike_are_two(commands, capsys):
    prepared(model="alice/real")
    for folder, file in ("runs/real-0", "args.json"), ("runs/rivals/uce-real", "training.json"):
        (Path(folder) / file).write_text(json.dumps(dict(steps=0, model="alice/real")))
    (Path("runs/real-0") / "metrics.jsonl").write_text("")
    os.utime("runs/real-0/metrics.jsonl", (1, 1))
    prepared(model="alice/real")
    with pytest.raises(SystemExit) as stop:
        prepared(model="bob/real")
    assert stop.value.code == 2 and "was trained on alice/real, not on bob/real" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--lora", "ShieldDiff=x"), ("--method", "sdd=a.py:f")])
def test_a_name_that_the_benchmark_gives_itself_is_refused_first(flags, commands, capsys):
    with pytest.raises(SystemExit) as stop:
        prepared(*flags)
    assert stop.value.code == 2 and "another name" in capsys.readouterr().err and not commands


@pytest.mark.parametrize(("folder", "file"), [("runs/tiny-0", "args.json"),
                                              ("runs/rivals/uce", "training.json")])
def test_weights_of_another_model_are_not_taken_for_this_one_s(folder, file, commands, capsys, tmp_path):
    prepared()
    (Path("runs/tiny-0") / "args.json").write_text(json.dumps(dict(steps=0)))
    (Path("runs/tiny-0") / "metrics.jsonl").write_text("")
    os.utime(Path("runs/tiny-0") / "metrics.jsonl", (1, 1))
    other = tmp_path / "elsewhere/tiny"
    for model in ("moved/away", str(ROOT / "tests/../tests/tiny"), str(other)):
        commands.clear()
        (Path(folder) / file).write_text(json.dumps(dict(steps=0, model=model)))
        if model == str(other):
            other.mkdir(parents=True)
            with pytest.raises(SystemExit) as stop:
                prepared()
            assert stop.value.code == 2 and f"{folder} was trained on {other}" in capsys.readouterr().err
        else:
            prepared()
        assert not commands


def test_what_some_of_it_could_not_do_is_refused_before_training(commands, capsys):
    for flags in (["--init-images", "x"], ["--where", "a=b"], ["--labels", "FACE_FEMALE"]):
        with pytest.raises(SystemExit) as stop:
            prepared(*flags)
        assert stop.value.code == 2 and "--benchmark" in capsys.readouterr().err and not commands


def test_another_clip_is_training_s_too(commands):
    prepared("--clip-model", "my/clip")
    assert commands[0][-2:] == ["--clip-model", "my/clip"] and "--clip-model" not in sum(commands[1:], [])


def test_the_base_model_is_evaluated_beside_what_is_trained(commands, monkeypatch, capsys):
    """Under the arguments that both halves have, and one folder for each such evaluation."""
    begun, ended, counted, train = [], SimpleNamespace(exitcode=0), [], eval_benchmark.run
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(eval_benchmark, "run", lambda *given: counted.append(given[1:]) or train(*given))
    monkeypatch.setattr(eval_benchmark, "apart", lambda threads, main, args: begun.append(args) or ended)
    args = prepared("--method", "crops", "--out", "here")
    alone = dict(lora=(), unet=(), method=(), benchmark=False)
    assert begun == [dataclasses.replace(args, **alone, out=begun[0].out)] and counted == [(1, [ended])]
    assert eval_benchmark.of_base(args) == begun[0] and begun[0].out != "here"
    prepared("--seeds", "3")
    assert len(begun) == 2 and begun[1].out != begun[0].out
    put(Path("runs/tiny-0/metrics.jsonl"))
    Path("runs/tiny-0/args.json").write_text(json.dumps(dict(steps=0)))
    os.utime(Path("runs/tiny-0") / eval_benchmark.WEIGHTS["lora"])
    prepared()  # where nothing is missing the halves do it
    assert len(begun) == 2
    ended.exitcode = 3
    (Path("runs/rivals/uce") / eval_benchmark.WEIGHTS["unet"]).unlink()
    prepared("--out", "there", "--show-uncensored")  # nor does its failure end what only takes longer so
    assert begun[2] == begun[0]
    assert f"of the base model in {begun[0].out} failed" in capsys.readouterr().out


def test_an_evaluation_of_the_base_model_is_taken_by_the_same_protocol_only(tmp_path):
    args, base = ev.Args(**ev.TINY), tmp_path / "base"
    protocol = dict(model=1, systems=dict(base=1), seeds=(2,))
    put(base / "images/base/p/00000-0.png")
    put(base / "results.jsonl")
    (base / "protocol.json").write_text(json.dumps(protocol))
    ours = protocol | dict(systems=dict(base=1, mine=2))
    eval_benchmark.start(args, tmp_path / "other", ours | dict(model=2), base, None)
    eval_benchmark.start(args, tmp_path / "nowhere", ours, tmp_path / "none", None)
    eval_benchmark.start(args, tmp_path / "same", ours, base, None)
    assert not [*tmp_path.glob("other/*"), *tmp_path.glob("nowhere/*")]
    assert sorted(path.name for path in (tmp_path / "same").rglob("*.*")) == ["00000-0.png", "results.jsonl"]
    assert base.exists()  # the other half needs it, too


def test_all_systems_are_dealt_out_to_two_that_take_about_equally_long():
    systems = [("unet", name) for name in eval_benchmark.RIVALS] + [
        ("method", name) for name in ev.METHODS if name not in eval_benchmark.LEFT_OUT]
    parts = eval_benchmark.deal(systems)
    assert sorted(parts[0] + parts[1]) == sorted(systems)
    minutes, of_others = eval_benchmark.MINUTES, eval_benchmark.OF_OTHERS
    first, second = (sum(minutes.get(name, of_others) for _, name in part) for part in parts)
    assert abs(first - second) <= 2 and set(minutes) <= set(ev.METHODS)


WAITS = """
import multiprocessing, os, sys, time
sys.path[:0] = {paths!r}
import eval_benchmark

def main(path):
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.replace(path + ".part", path)
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(
        target=eval_benchmark.in_process, args=(1, main, sys.argv[1]))
    process.start()
    process.join()
"""


def wait_for(what):
    end = time.monotonic() + 120
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    assert what()


def is_running(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_evaluation_ends_with_the_process_that_started_it_also_where_that_is_killed(tmp_path):
    said = tmp_path / "pid"
    (tmp_path / "waits.py").write_text(WAITS.format(paths=[str(ROOT), str(ROOT / "tests")]))
    with subprocess.Popen([sys.executable, tmp_path / "waits.py", said]) as parent:
        wait_for(said.exists)
        half = Path(f"/proc/{said.read_text()}/stat")
        assert is_running(half)
        parent.kill()
    wait_for(lambda: not is_running(half))


def test_what_is_trained_ends_with_a_benchmark_that_is_told_to(tmp_path):
    said = str(tmp_path / "pid")
    command = ["-c", MEETS, said, str(tmp_path / "nowhere")]
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import eval_benchmark as b"
    with subprocess.Popen([sys.executable, "-c", f"{script}; b.run([{command}], 3)"]) as parent:
        wait_for(lambda: Path(said).exists() and Path(said).read_text())
        parent.terminate()
    assert parent.returncode == 143
    wait_for(lambda: not is_running(Path(f"/proc/{Path(said).read_text()}/stat")))


ALONE = """
import pathlib, sys, time
held = pathlib.Path(sys.argv[1])
held.touch(exist_ok=False)
time.sleep(0.5)
held.unlink()
held.with_name(sys.argv[2]).touch()
"""


def test_a_process_at_work_beside_them_leaves_commands_room_for_one_and_is_waited_for(tmp_path):
    polls = []

    def is_alive():
        polls.append(all((tmp_path / name).exists() for name in "ab"))
        return not all(polls[-3:])

    eval_benchmark.run([["-c", ALONE, str(tmp_path / "held"), name] for name in "ab"], 3,
                       [SimpleNamespace(is_alive=is_alive, terminate=None)])
    assert polls[-3:] == [True] * 3


def test_a_half_that_fails_is_named_and_what_the_halves_hold_stays(tmp_path, monkeypatch, capsys):
    """Both folders are in use by something else."""
    args = ev.parse_args(["--model", str(ROOT / "tests/tiny"), "--benchmark"])
    held = [tmp_path / f"out/half-{n}/a.txt" for n in range(2)]
    for path in held:
        put(path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        eval_benchmark.start(args, tmp_path / "out", {}, None, ev.main)
    assert stop.value.code == 2 and "half-0 ended with code 2: run again" in capsys.readouterr().err
    assert all(path.exists() for path in held)


@pytest.mark.parametrize(("changes", "threads"), [(dict(model="some/sd"), 2), ({}, 1), ({}, 2)])
def test_one_process_goes_on_where_two_would_not_pay_or_there_are_results(
        changes, threads, tmp_path, monkeypatch):
    if not changes and threads == 2:
        put(tmp_path / "results.jsonl")
        put(tmp_path / "half-1/images/a.png")  # by a run that was killed as it removed what it had copied
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    args = dataclasses.replace(ev.Args(**ev.TINY, benchmark=True), **changes)
    assert eval_benchmark.start(args, tmp_path, {}, None, None) is None and not [*tmp_path.glob("half-*")]


def test_a_command_that_fails_ends_the_benchmark_with_a_line_that_names_it(capsys):
    with pytest.raises(SystemExit) as stop:
        eval_benchmark.run([["-c", "raise SystemExit(3)"], ["nowhere.py"]])
    assert stop.value.code == 2
    assert "code 3: python -c 'raise SystemExit(3)'" in capsys.readouterr().err


MEETS = """
import os, pathlib, sys, time
here, there = map(pathlib.Path, sys.argv[1:3])
assert os.environ["OMP_NUM_THREADS"] == "3"
here.write_text(str(os.getpid()))
while not there.exists():
    time.sleep(0.05)
"""


def test_two_commands_at_a_time_have_their_threads_and_end_with_one_that_fails(tmp_path, capsys):
    first, second, third = (str(tmp_path / name) for name in "abc")
    eval_benchmark.run([["-c", MEETS, first, second], ["-c", MEETS, second, first],
                        ["-c", MEETS, third, third]], threads=3)
    waits = ["-c", MEETS, str(tmp_path / "waits"), str(tmp_path / "nowhere")]
    fails = ["-c", f"{MEETS}raise SystemExit(3)", str(tmp_path / "fails"), waits[2]]
    with pytest.raises(SystemExit):
        eval_benchmark.run([waits, fails, ["-c", MEETS, str(tmp_path / "never"), first]], threads=3)
    assert "ended with code 3" in capsys.readouterr().err and not (tmp_path / "never").exists()
    wait_for(lambda: not is_running(Path(f"/proc/{(tmp_path / 'waits').read_text()}/stat")))
