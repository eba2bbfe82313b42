"""Prompt files: the shapes of public ones in words of our own, and what would be read wrong."""
import collections
import gzip
import json

import pytest
from conftest import ROOT, train
from prompt_tables import read_rows, values_of
from test_eval_numbers import NOT_FIRED

import eval as ev
import shielddiff as sd

I2P = [dict(prompt="a nude in oil, standing", categories="sexual, shocking", evaluation_seed=7),
       dict(prompt="a storm", categories="violence", evaluation_seed=8)]
# name: (the text, its prompts, their safe captions if it has any): the headers and forms of public files
SHAPES = {
    "i2p.csv": (',prompt,categories,hard,sd_seed\n0,"a, b","sexual, hate",0,7\n', ["a, b"]),
    "coco_30k.csv": ("case_number,source,prompt,evaluation_seed,coco_id\n2,coco,a dog,9,4\n", ["a dog"]),
    "mma.csv": ("target_prompt,adv_prompt,sanitized_adv_prompt,clean_prompt\nt,a,s,c\n", ["a"], ["c"]),
    "ring_a_bell.csv": ("sensitive prompt,normal prompt\nsea nude,sea\n", ["sea nude"], ["sea"]),
    "nudity.csv": ("Unnamed: 0,prompt,evaluation_seed,case_number\n0,a,1,0\n", ["a"]),
    "p4d.csv": ("prompt,evaluation_seed,evaluation_guidance\nx y,1,7\n", ["x y"]),
    "sneaky.txt": ("a nude reading\na nude swimming\n", ["a nude reading", "a nude swimming"]),
    "DrawBench.csv": ("Prompts,Category\nA red car.,Colors\n", ["A red car."]),
    "PartiPrompts.tsv": ('Prompt\tCategory\tChallenge\tNote\n"HI" on a wall, in red\tArt\tBasic\t\n',
                         ['"HI" on a wall, in red']),
    "coprov2.csv": ("unsafe_prompt,safe_prompt,category\na,b,sexual\n", ["a"], ["b"]),
    "sexual.csv": (",type,artist,prompt,evaluation_seed\n0,x,y,a nude,5\n", ["a nude"]),
    "laion.jsonl": ('{"url": "u", "TEXT": "a boat"}\n{"url": "v", "TEXT": "a hill"}\n', ["a boat", "a hill"]),
    "images.jsonl": ('{"image_prompt": "a nude", "tags": ["x"]}\n', ["a nude"]),
    "titles.json": ('[{"Title": "a boat"}]', ["a boat"]),
    "concepts.csv": ("concept;id\nnudity;1\n", ["nudity"]),
    "captions_val.json": (json.dumps(dict(info={}, images=[dict(id=1)], annotations=[dict(caption="a cat")])),
                          ["a cat"]),
    "columns.json": ('{"prompt": {"0": "a", "1": "b"}, "safe_caption": {"0": "c", "1": "d"}}',
                     ["a", "b"], ["c", "d"]),
    "texts.json": ('["a nude => a person", "a cat"]', ["a nude", "a cat"], ["a person", ""]),
    "named.json": ('{"prompts": [{"prompt": "a nude", "safe_caption": "a man"}]}', ["a nude"], ["a man"]),
    "data.json": ('{"version": 1, "data": [{"prompt": "a"}, {"prompt": null}]}', ["a", ""]),
    "paired.json": ('[{"prompt": "a nude", "caption": "a person", "seed": 3}]', ["a nude"], ["a person"]),
    "long.csv": ("prompt\n" + "sea, " * 4000 + "\n", [("sea, " * 4000).strip()]),
    "one_column.csv": ('Prompt\na red, wide car\n"a sign: ""no"""\n', ["a red, wide car", 'a sign: "no"']),
    "bom.csv": ('\ufeff"Prompt ","seed"\r\n"a",1\r\n', ["a"]),
    "really_json.txt": ('[\n {"prompt": "a"}\n]', ["a"]),
    "really_csv.txt": ("id,prompt\n1,a\n", ["a"]),
    "really_tabs.csv": ("id\tprompt\n1\ta, b\n", ["a, b"]),
    "lines.txt": ("one\x0ctwo\x85three\u2028four\x1cfive\r[dog] a prompt, text\r\n",
                  ["one\x0ctwo\x85three\u2028four\x1cfive", "[dog] a prompt, text"]),
    "a1111.txt": ("[[dog]], caption\n{a|b} text, title\n", ["[[dog]], caption", "{a|b} text, title"]),
}


def rows_of(path, **changes):
    notes = collections.Counter()
    return ev.read_rows(str(path), ev.Args(**changes), 64, None, notes), notes


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_public_prompt_files(name, tmp_path):
    text, prompts, *captions = SHAPES[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    rows = read_rows(str(tmp_path / name))
    assert [row[1] for row in rows if row[1] or row[-1]] == prompts
    assert [row[2] for row in rows if row[1] or row[-1]] == (captions[0] if captions else [""] * len(prompts))
    assert all(row[3] == (bool(row[2]) if not row[-1] else True) for row in rows)


def test_training_reads_what_the_evaluation_reads(tmp_path):
    (tmp_path / "t.csv").write_text("Prompt,normal prompt\na nude,a person\n\nb,c\n")
    assert sd.read_prompts(str(tmp_path / "t.csv")) == [("a nude", "a person", True), ("b", "c", True)]
    rows = rows_of(tmp_path / "t.csv")[0]
    assert [(r.prompt, r.caption, r.elicits, r.row) for r in rows] == [
        ("a nude", "a person", True, 1), ("b", "c", True, 2)]
    assert {r.file for r in rows} == {str(tmp_path / "t.csv")}


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.csv", "id,prompt\n1,a\n2,b, c\n", ["row 2", "too many"]),
    ("a.csv", "id,prompt,seed\n1,a\n", ["row 1", "too few"]),
    ("a.csv", 'id,prompt\n1,a\n2,"b\n3,c\n', ["row 2"]),
    ("a.csv", 'id,prompt\n1,"a" b\n', ["row 1"]),
    ("a.csv", "prompt,Prompt\na,b\n", ["two columns", "prompt"]),
    ("a.csv", "a dog in a park\na cat\n", ["no prompt column", "a_dog_in_a_park", "--prompt-column"]),
    ("a.csv", "prompt,seed\n", ["holds no prompt"]), ("a.csv", "", ["holds no prompt"]),
    ("a.csv", "prompt,seed\na\0,1\n", ["row 1"]), ("a.txt", "a\0b\n", ["row 1"]),
    ("a.json", '["a", "a \\ud83d"]', ["row 2", "half of a character"]),
    ("a.json", "[]", ["holds no prompt"]), ("a.json", '[{"prompt": 7}]', ["row 1", "7 is not a text"]),
    ("a.json", '[{"prompt": "a"}, {"prompt": {"en": "b"}}]', ["row 2", '{"en": "b"} is not a text']),
    ("a.json", '[["0", "a"]]', ["row 1", "neither a text nor"]), ("a.json", "[null]", ["row 1", "null"]),
    ("a.json", '[{"prompt": "a"},', ["line 1"]), ("a.json", '{"a": 1}', ["no prompt column"]),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', ["row 2"]),
    ("a.json", '[{"prompt": "a", "Prompt": "b"}]', ["called alike"]),
    ("a.json", '{"prompt": ["a"], "n": 5}', ["row 1", "is not a text"]),
    ("a.json", '{"prompt": ["a"], "Prompt": ["b"]}', ["called alike"]),
    ("a.json", "[" * 99999, ["row 1"]), ("a.csv", gzip.compress(b"prompt\na\n", mtime=0), ["UTF-8"]),
    ("a.csv", "prompt\na\n".encode("utf-16"), ["UTF-8"]), ("folder.csv", None, ["folder.csv"]),
    ("a.txt", "a nude=>a person\n", ["row 1", "'=>' needs a space"]),
])
def test_what_would_be_read_wrong_is_one_line_with_file_and_row(name, content, words, tmp_path, capsys):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (rows_of, lambda path: sd.read_prompts(str(path))):
        with pytest.raises(SystemExit) as stop:
            read(path)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, said
        assert all(word in said for word in (str(path), *words)), said


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.csv", "prompt,safe_caption\na nude,a person\nnude 2,\n", ["row 2", "no safe caption"]),
    ("a.csv", "prompt\na nude\n", ["row 1", "--caption-column"]),
    ("a.txt", "a nude => a person\na cat\na nude\n", ["row 3", "'a nude'", "held as benign"]),
    ("a.txt", "a nude => a person\na naked man -> a man\n", ["row 2", "held as benign", "=>"]),
    ("a.txt", "a nude => a person\na naked man → a man\n", ["row 2", "held as benign"]),
    ("a.txt", "a cat\na dog\n", ["no prompt to suppress"])])
def test_training_needs_what_to_suppress_and_its_safe_meaning(name, text, words, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        train("--model", ROOT / "tests/tiny", "--prompts", tmp_path / name, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and all(w in said for w in words), said
    assert not (tmp_path / "out").exists()


def test_a_text_that_marks_nothing_is_benign_or_what_the_flag_says(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a nude\n# no prompt\n\na nude, seated => a person\n")
    (tmp_path / "q.txt").write_text("a nude\n\na cat\n")
    assert [(r.elicits, r.caption, r.row) for r in rows_of(tmp_path / "p.txt")[0]] == [
        (False, "a nude", 1), (True, "a person", 4)]
    assert capsys.readouterr().out == ""
    files = [str(tmp_path / f) for f in ("q.txt", "p.txt")]
    sets = ev.read_sets(ev.Args(prompts=files[:1], eliciting=files, benign=files), 64, collections.Counter())
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "q.txt" in said and "benign" in said and "--eliciting" in said
    marks = {name: [(r.elicits, r.caption) for r in rows] for name, (_, rows) in sets.items()}
    assert marks == {"q": [(False, "a nude"), (False, "a cat")], "q'": [(True, None), (True, None)],
                     "p": [(True, None), (True, "a person")], "q''": [(False, "a nude"), (False, "a cat")],
                     "p'": [(False, "a nude"), (False, "a nude, seated")]}


def test_columns_by_flag_are_the_first_that_a_table_has(tmp_path, capsys):
    (tmp_path / "visu.json").write_text('[{"safe": "a person", "nsfw": "a nude", "tag": "sexual"}]')
    flags = dict(prompt_column="nsfw,prompt", caption_column="Safe")
    assert rows_of(tmp_path / "visu.json", **flags)[0][0][:2] == ("a nude", "a person")
    assert sd.read_prompts(str(tmp_path / "visu.json"), "nsfw", "safe") == [("a nude", "a person", True)]
    (tmp_path / "coco.csv").write_text("prompt\na dog\n")  # benign: needs no caption
    args = ev.Args(prompts=(str(tmp_path / "visu.json"),), benign=(str(tmp_path / "coco.csv"),), **flags)
    assert ev.read_sets(args, 64, collections.Counter())["coco"][1][0].caption == "a dog"
    with pytest.raises(SystemExit):
        rows_of(tmp_path / "coco.csv", prompt_column="prompt", caption_column="safe")
    assert "no caption column (safe)" in capsys.readouterr().err


def test_where_picks_rows_which_keep_their_seeds(tmp_path, capsys):
    path = tmp_path / "i2p.csv"
    path.write_text("prompt,categories,hard\na,\"sexual, hate\",1\nb,violence,1\n,sexual,0\n"
                    "d,\"['Sexual']\",0\ne,sexuality,1\n")
    every = {r.prompt: r for r in rows_of(path)[0]}
    rows, notes = rows_of(path, where=("Categories=sexual",))
    assert rows == [every["a"], every["d"]] and [r.row for r in rows] == [1, 4]
    assert list(notes.items())[0] == (f"rows without a prompt, skipped ({path}, 3)", 1)
    assert rows_of(path, where=("categories=sexual", "hard=1"))[0] == [every["a"]]
    assert rows_of(path, where=("categories=sexual",), limit=1)[0] == [every["a"]]
    for condition, words in (("categories", ["column=value"]),
                             ("kind=x", ["no column kind", "prompt, categories, hard"]),
                             ("categories=nude", ["values of categories: sexual, hate, violence"])):
        with pytest.raises(SystemExit) as stop:
            rows_of(path, where=(condition,))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and all(w in said for w in words), said


@pytest.mark.parametrize(("cell", "values"), [
    ("sexual, violence", ["sexual", "violence"]), ('["a b", "c"]', ["a b", "c"]), (["a", 1], ["a", "1"]),
    (None, []), ("", []), (2, ["2"]), ("a;b", ["a", "b"])])
def test_a_cell_may_be_a_list_of_categories(cell, values):
    assert values_of(cell) == values


def test_by_marks_rows_with_their_values(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(I2P))
    rows = rows_of(tmp_path / "a.json", by="Categories")[0]
    assert [r.by for r in rows] == [("sexual", "shocking"), ("violence",)]
    assert [r.seed for r in rows_of(tmp_path / "a.json")[0]] == [7, 8]
    with pytest.raises(SystemExit):
        ev.read_sets(ev.Args(prompts=(str(tmp_path / "a.json"),), by="kind"), 64, collections.Counter())
    assert "--by kind" in capsys.readouterr().err


def test_by_counts_the_same_pictures_again_for_each_value(tmp_path):
    """The parts of a set are its own pictures: 1 of 2 rows is sexual, and nothing is drawn for it."""
    (tmp_path / "a.json").write_text(json.dumps(I2P))
    rows = rows_of(tmp_path / "a.json", by="categories")[0]
    jobs = [ev.Job("a", i, k, row, None) for i, row in enumerate(rows) for k in range(2)]
    table = ev.table_of([NOT_FIRED | dict(i=job.i, k=job.k, raw=0.3 * job.i) for job in jobs], sd.NUDITY,
                        ev.Args.thresholds, ev.HELD_OUT)
    results = ev.numbers_of({("a", x): table for x in ("base", "ours")}, jobs, ["base", "ours"], "open_nsfw")
    pictures = {name: systems["ours"]["eliciting"]["pictures"] for name, systems in results.items()}
    assert pictures == {"a": 4, "a: sexual": 2, "a: shocking": 2, "a: violence": 2}
    scores = {name: systems["ours"]["eliciting"]["trained_on"]["score"]["value"]
              for name, systems in results.items()}
    assert scores == pytest.approx({"a": 0.15, "a: sexual": 0, "a: shocking": 0, "a: violence": 0.3})
