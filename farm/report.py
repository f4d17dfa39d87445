"""What a farm did: JSON for programs, and for its own next run; a page for people."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..quant.files import atomic
from ..quant.files.memory.switches import duration, gigabytes
from .ledger import BEFORE, DONE, FAILED, Entry, Ledger

FORMAT = 1
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; vertical-align: top }
th, td { border-bottom: 1px solid #8884; font-variant-numeric: tabular-nums }
td { overflow-wrap: anywhere } td:nth-child(n + 3) { min-width: 5rem }
.refused { color: light-dark(#b02a1a, #ff9d8f) } small { opacity: .7 }
:root { color-scheme: light dark }
"""


def facts(ledger: Ledger, seconds: float) -> dict[str, Any]:
    """The report. seconds: that the farm has run."""
    jobs = [_entry(entry) for entry in ledger.wholes]
    return {
        "format": FORMAT,
        "seconds": round(seconds, 1),
        "cluster": ledger.cluster,
        "notes": ledger.notes,
        "workers": _workers(ledger.entries.values()),
        "jobs": jobs,
    }


def write(base: Path, ledger: Ledger, seconds: float) -> list[Path]:
    """Writes `<base>.json` and `<base>.html`; returns both. Raises FileRefused."""
    found = facts(ledger, seconds)
    paths = [base.with_name(base.name + ending) for ending in (".json", ".html")]
    for path, text in zip(paths, (json.dumps(found, indent=1), page(found)), strict=True):
        atomic.write(path, text.encode(errors="backslashreplace"))
    return paths


def earlier(base: Path) -> dict[str, dict]:
    """The jobs of the last report, by name; none where there is no report that can be read."""
    try:
        text = base.with_name(base.name + ".json").read_text(encoding="utf-8")
        found = json.loads(text)
        return {job["name"]: job for job in found["jobs"]} if found["format"] == FORMAT else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def headline(ledger: Ledger) -> str:
    """'18 of 20 made, 1 of them before; 1 failed, 1 waiting'."""
    made, before = ledger.count(DONE, BEFORE), ledger.count(BEFORE)
    failed = ledger.count(*FAILED)
    left = len(ledger.wholes) - made - failed
    words = f"{made} of {len(ledger.wholes)} made" + (f", {before} of them before" * bool(before))
    rest = [f"{failed} failed"] * bool(failed) + [f"{left} not yet"] * bool(left)
    return "; ".join([words, *rest])


def page(found: Mapping[str, Any]) -> str:
    """The report as one page of HTML, which needs nothing beside it."""
    failed = [job for job in found["jobs"] if job["state"] in FAILED]
    made = [job for job in found["jobs"] if job["result"]]
    title = f"{len(made)} of {len(found['jobs'])} models quantized"
    counts = [f"{len(failed)} could not be made"] if failed else []
    if waiting := len(found["jobs"]) - len(made) - len(failed):
        counts.append(f"{waiting} not yet")
    parts = [f"<h1>{title}</h1>", f"<p>{'; '.join([_summary(found, made), *counts])}</p>"]
    if failed:
        rows = [[job["name"], job["recipe"], job["state"], job["sentence"]] for job in failed]
        parts += ["<h2>Not made</h2>", _table(["model", "recipe", "", "why"], rows, "refused")]
    if made:
        heads = ["model", "recipe", "from", "to", "layers' error", "worst", "time", "worker"]
        parts += ["<h2>Made</h2>", _table(heads, map(_row, made))]
    if found["workers"]:
        rows = [
            [name, each["jobs"], duration(each["seconds"])]
            for name, each in found["workers"].items()
        ]
        parts += ["<h2>Workers</h2>", _table(["worker", "models", "at work"], rows)]
    parts += [f"<p><small>{html.escape(note)}</small></p>" for note in found["notes"]]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n{head}\n" + "\n".join(parts) + "\n"


def _entry(entry: Entry) -> dict[str, Any]:
    job = entry.job
    return {
        "name": job.name,
        "source": str(job.source),
        "target": str(job.target),
        "recipe": job.recipe,
        "options": list(job.options),
        "state": entry.state,
        "workers": [name for part in (*entry.parts, entry) for name in part.workers],
        "parts": entry.job.parts,
        "at": entry.at,
        "seconds": round(entry.took, 3),
        "layers": list(entry.layers),
        "sentence": entry.sentence,
        "result": dict(entry.result),
        "stamps": entry.stamps,
    }


def _workers(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """What each worker finished: jobs, and seconds at them."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.state == DONE and entry.workers:
            each = found.setdefault(entry.workers[-1], {"jobs": 0, "seconds": 0.0})
            each["jobs"] += 1
            each["seconds"] = round(each["seconds"] + entry.seconds, 1)
    return dict(sorted(found.items()))


def _summary(found: Mapping[str, Any], made: list[dict]) -> str:
    before = sum(job["result"]["bytes_before"] for job in made)
    after = sum(job["result"]["bytes_after"] for job in made)
    workers = len(found["workers"])
    words = f"{gigabytes(before)} → {gigabytes(after)}"
    if made and all(job["state"] == BEFORE for job in made):
        return f"{words}, all of them in an earlier run"
    words += f" in {duration(found['seconds'])}"
    return words + (f" on {workers} workers" if workers > 1 else "")


def _row(job: Mapping[str, Any]) -> list[object]:
    result = job["result"]
    db = ["" if result[key] is None else f"{result[key]:.1f} dB" for key in ("db", "worst_db")]
    sizes = [gigabytes(result[key]) for key in ("bytes_before", "bytes_after")]
    tries = len(job["workers"])
    worker = job["workers"][-1] if tries else ""
    if job["parts"] > 1:
        worker = f"{len(set(job['workers']))} of them, in {job['parts']} parts"
    elif tries > 1:
        worker += f" (begun {tries} times)"
    if job["state"] == BEFORE:
        worker += ", in an earlier run"
    return [job["name"], job["recipe"], *sizes, *db, duration(job["seconds"]), worker]


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]], style: str = "") -> str:
    def cells(tag: str, row: Iterable[object]) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "\n".join(f'<tr class="{style}">{cells("td", row)}</tr>' for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>\n{body}</table>"
