"""Prompt files for training and evaluation alike: plain text, and the tables that others publish (CSV, TSV,
JSON, JSON Lines), told by what a file holds.

What would be read wrong is a ValueError that names the row, from 1; a header and blank lines do not count.
"""
import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# of public files, the likeliest first; the last four are also words of prompts and make no table of a .txt
PROMPT_COLUMNS = ("adv_prompt", "adversarial_prompt", "sensitive_prompt", "unsafe_prompt", "prompt",
                  "prompts", "image_prompt", "caption", "text", "title", "concept")
CAPTION_COLUMNS = ("safe_caption", "safe_prompt", "normal_prompt", "clean_prompt", "caption")
GAP = "\0"  # no text holds it: in place of a cell that is missing, and the name of those too many


def column(name: str) -> str:
    """The one spelling of a column's name: 'Sensitive Prompt' is sensitive_prompt."""
    return name.strip().lower().replace(" ", "_")


def find_column(known: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first of the known names that is there."""
    return next((name for name in map(column, known) if name in columns), None)


def json_rows(text: str) -> Iterable:
    """The items of a JSON list, of JSON Lines, or of an object that holds one list or columns."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # which the second of JSON Lines is
            raise
        return (json.loads(line) for line in text.split("\n") if line.strip())
    if not isinstance(found, dict):
        return found if isinstance(found, list) else [found]
    cells = {column(name): list(c.values()) if isinstance(c, dict) else c for name, c in found.items()}
    prompt = find_column(PROMPT_COLUMNS[:-4], list(cells))
    if prompt and isinstance(cells[prompt], list) and any(isinstance(c, dict) for c in cells[prompt]):
        prompt = None  # 'prompts' is the list's name
    if prompt and all(isinstance(c, list) for c in cells.values()) and len(cells) == len(found):  # columns
        return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    lists = [c for c in found.values() if isinstance(c, list) and c and isinstance(c[0], str | dict)]
    if len(lists) > 1:  # COCO: of images, licenses and annotations the last have captions
        lists = [c for c in lists if isinstance(c[0], dict) and find_column(PROMPT_COLUMNS, list(c[0]))]
    return lists[0] if len(lists) == 1 and not prompt else [found]


def csv_rows(lines: list[str], names: list[str], delimiter: str) -> Iterable[dict]:
    """The rows below a header."""
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]}")
    starts = (cell for line in lines for cell in line.split("\t") if cell.startswith('"'))
    plain = delimiter == "\t" and not all(cell.endswith('"') for cell in starts)  # quotes that quote no cell
    table = csv.DictReader((f"{line}\n" for line in lines), names, GAP, GAP, delimiter=delimiter, strict=True,
                           quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    for row in table:
        if GAP in row or GAP in row.values():
            raise ValueError(f"it has too {'many' if GAP in row else 'few'} cells for {len(names)} columns: "
                             "one that holds a separator or a line end needs quotes around it")
        yield row


def table_rows(text: str, suffix: str) -> Iterable[str | dict] | None:
    """{column: cell} of the rows of a table, the items of JSON; None where the file is plain text."""
    lines = text.split("\n")
    first = next(filter(str.strip, lines), "")
    if suffix in (".json", ".jsonl") or first[:1] in ("[", "{") and text.lstrip("[{ \t\n")[:1] == '"':
        return json_rows(text)
    headers = {d: [column(name) for name in next(csv.reader([first], delimiter=d), [])] for d in "\x1f,\t;"}
    delimiter = max(headers, key=lambda d: (bool({*headers[d]} & {*PROMPT_COLUMNS}), len(headers[d])))
    if suffix in (".csv", ".tsv") or find_column(PROMPT_COLUMNS[:-4], headers[delimiter]):
        return csv_rows(lines[lines.index(first) + 1:], headers[delimiter], delimiter)


def read_rows(path: str, *columns: str | None) -> list[tuple[int, str, str, bool, dict]]:
    """[(row from 1, prompt, safe caption, whether it elicits, {column: cell})] of a prompt file; "" is none.
    Of a text, lines with ' => ' elicit; of a table all rows do. columns: as in parse. Raises OSError, and
    ValueError for what would be read wrong."""
    try:
        text, rows = Path(path).read_text(encoding="utf-8-sig"), []
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from None
    lines = ["" if line.lstrip()[:1] == "#" else line for line in text.split("\n")]  # no splitlines()
    for i, row in enumerate(parse(text, Path(path).suffix.lower(), lines, *columns), 1):
        if isinstance(row, str):
            prompt, arrow, caption = map(str.strip, row.strip().partition(" => "))
            if "=>" in prompt or GAP in row:  # taken for a benign prompt it would be held
                raise ValueError(f"row {i}: '=>' needs a space and a text on both sides: {row.strip()}")
            row = prompt, caption, bool(arrow), {}
        if (row[0] + row[1]).encode(errors="ignore").decode() != row[0] + row[1]:
            raise ValueError(f"row {i}: half of a character (an emoji cut in two?): {row[0]!a:.60}")
        rows.append((i, *row))
    return rows


def training_rows(path: str, *columns: str | None) -> list[tuple[str, str, bool]]:
    """[(prompt, safe caption, whether it elicits)] of a file to train on. Raises as read_rows."""
    rows = [row for row in read_rows(path, *columns) if row[1]]
    suppressed = {prompt for _, prompt, _, elicits, _ in rows if elicits}
    for i, prompt, caption, elicits, _ in rows:
        if elicits and not caption:
            raise ValueError(f"row {i} has no safe caption to train on: see --caption-column")
        if not elicits and (prompt in suppressed or re.search("->|→", prompt)):  # it would be held
            raise ValueError(f"row {i} would be held as benign: {prompt!r:.60}. What to suppress is written "
                             "'prompt => safe caption', wherever it is named")
    if not suppressed:
        raise ValueError("it holds no prompt to suppress, 'prompt => safe caption' or a table's row")
    return [(prompt, caption or prompt, elicits) for _, prompt, caption, elicits, _ in rows]


def parse(text: str, suffix: str, lines: list[str], prompt_column: str | None = None,
          caption_column: str | None = None) -> list[str | tuple[str, str, bool, dict]]:
    """(prompt, safe caption, True, {column: cell}) of a table's rows, "" where there is none; the texts in a
    JSON list; `lines` where the file is plain text. A column goes by its known names, or by the given one, or
    several with commas."""
    rows = []
    try:
        found = table_rows(text, suffix)
        if found is None:
            return lines
        for row in found:
            if not isinstance(row, str | dict):
                raise ValueError(f"{json.dumps(row):.60} is neither a text nor an object with named cells")
            cells = row if isinstance(row, str) else {column(name): cell for name, cell in row.items()}
            if len(cells) < len(row):
                raise ValueError(f"two columns are called alike: {', '.join(row)}")
            if any(GAP in str(cell) for cell in ([cells] if isinstance(cells, str) else cells.values())):
                raise ValueError("it holds a NUL, which no text does")
            rows.append(cells)
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"row {len(rows) + 1}: {error}") from error
    return named(rows, prompt_column, caption_column)


def named(rows: list[str | dict], prompt_column: str | None, caption_column: str | None) -> list[str | tuple]:
    """What parse returns, of rows by column."""
    columns = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    prompts = prompt_column.split(",") if prompt_column else PROMPT_COLUMNS
    captions = caption_column.split(",") if caption_column else CAPTION_COLUMNS
    prompt = find_column(prompts, columns)
    caption = find_column(captions, [name for name in columns if name != prompt])
    for what, names, found in ("prompt", prompts, prompt), ("caption", captions, caption):
        if columns and found is None and (what == "prompt" or caption_column):
            raise ValueError(f"it has no {what} column ({', '.join(names)}): name one by --{what}-column; "
                             f"its columns: {', '.join(columns)}")
    result = []
    for i, row in enumerate(rows, 1):
        if isinstance(row, dict):
            texts = ["" if row.get(name) is None else row[name] for name in (prompt, caption)]
            if wrong := [text for text in texts if not isinstance(text, str)]:
                raise ValueError(f"row {i}: {json.dumps(wrong[0]):.60} is not a text")
            row = *map(str.strip, texts), True, row
        result.append(row)
    return result


def values_of(cell) -> list[str]:
    """The categories in a cell: a list's items, of 'sexual, violence' the parts."""
    text = "" if cell is None else str(cell).strip("[] ")
    parts = cell if isinstance(cell, list) else re.split("[,;]", text)
    return [value for value in (str(part).strip(" '\"") for part in parts) if value]


def shortened(values: list, most=8) -> str:
    """The first few of them, for a message."""
    return ", ".join(f"{value!s:.40}" for value in values[:most]) + ", ..." * (len(values) > most) or "none"


def select(rows: list[tuple], condition: str) -> list[tuple]:
    """Of rows that end in {column: cell} those whose cell is or holds the value: 'column=value'."""
    name, equals, value = condition.partition("=")
    if not equals:
        raise ValueError("cannot be searched without a value: column=value")
    name, value = column(name), value.strip().lower()
    columns = list(dict.fromkeys(name for *_, cells in rows for name in cells))
    if name not in columns:
        raise ValueError(f"has no column {name}; its columns: {', '.join(columns) or 'none'}")
    held = [[str(cells.get(name)).strip(), *values_of(cells.get(name))] for *_, cells in rows]
    kept = [row for row, values in zip(rows, held, strict=True) if value in map(str.lower, values)]
    if not kept:
        there = dict.fromkeys(v for *_, cells in rows for v in values_of(cells.get(name)))
        raise ValueError(f"has no such row; values of {name}: {shortened(list(there))}")
    return kept
