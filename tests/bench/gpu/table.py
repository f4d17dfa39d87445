"""The end of a GPU run: the figures that decide, in one table."""

from __future__ import annotations

EXPECTED = {"sm90, 256 x 128": "900-1150", "sm90, 128 x 128": "750-950", "sm100": "500-700"}
"""TOP/s on an H200 by arithmetic, to hold what is measured against."""


def lines(whole: dict) -> list[str]:
    parts = (_machine, _states, _probes, _smoke, _checks, _ceilings, _products, _transformer, _rest)
    return [line for part in parts for line in part(whole)]


def _machine(whole: dict) -> list[str]:
    facts = whole.get("environment", {})
    names = ("gpu", "capability", "driver", "cuda_of_torch", "kernels")
    return ["==== summary ====", "  ".join(f"{n}={facts[n]}" for n in names if n in facts)]


def _states(whole: dict) -> list[str]:
    """Sections that did not finish, and where time went."""
    found = {name: facts for name, facts in whole.items() if isinstance(facts, dict)}
    took = [f"{name} {f['seconds']:.0f} s" for name, f in found.items() if "seconds" in f]
    bad = [
        f"  {name}: {facts['state']}"
        for name, facts in found.items()
        if facts.get("state", "finished") != "finished"
    ]
    absent = [f"  {name}: {facts['absent']}" for name, facts in found.items() if "absent" in facts]
    return ["sections: " + ", ".join(took), *bad, *absent]


def _probes(whole: dict) -> list[str]:
    rows = whole.get("probe", {}).get("rows", [])
    wrong = [row for row in rows if not row["ok"]]
    return [f"probes: {len(rows) - len(wrong)} of {len(rows)} right"] + [
        f"  WRONG {row['name']}: {row['wrong']} of {row['of']}, worst {row['worst']:.3g}"
        for row in wrong
    ]


def _smoke(whole: dict) -> list[str]:
    facts = whole.get("smoke", {})
    dead = facts.get("dead", {})
    said = [f"routes alive: {facts.get('alive')}; whole linears take {facts.get('default')}"]
    return said + [f"  DEAD {name}: {why}" for name, why in dead.items()]


def _checks(whole: dict) -> list[str]:
    facts = whole.get("correctness", {})
    said = [f"correctness: {facts.get('failed')} of {facts.get('checks')} failed"]
    for row in [row for row in facts.get("rows", []) if not row["ok"]][:20]:
        said.append("  FAILED " + str({k: v for k, v in row.items() if k != "ok"}))
    return [*said, f"robustness, failed: {whole.get('robustness', {}).get('failed')}"]


def _ceilings(whole: dict) -> list[str]:
    facts = whole.get("ceilings", {})
    tops = {name: round(value) for name, value in facts.get("tops", {}).items()}
    gbs = {name: round(facts.get(name) or 0) for name in ("copy_gb_s", "cache_gb_s")}
    return [f"ceilings: TOP/s {tops}, GB/s {gbs}"]


def _products(whole: dict) -> list[str]:
    """Rows of routes, columns of sizes: geometric means over FLUX's six layers."""
    found = whole.get("products", {}).get("summary", {})
    if not found:
        return ["products: none measured"]
    names = dict.fromkeys(name for size in found.values() for name in size)
    said = [f"{'TOP/s (quantize_down: GB/s)':26}" + "".join(f"{size:>15}" for size in found)]
    for name in names:
        cells = [f"{size[name]:15.0f}" if name in size else f"{'':15}" for size in found.values()]
        expected = f"   by arithmetic {EXPECTED[name]}" if name in EXPECTED else ""
        said.append(f"{name:26}" + "".join(cells) + expected)
    return said


def _transformer(whole: dict) -> list[str]:
    rows = [row for row in whole.get("transformer", {}).get("rows", [])]
    dense = next((r["ms"] for r in rows if r["model"] == "bfloat16" and "ms" in r), None)
    said = []
    for row in rows:
        if "ms" not in row:
            said.append(f"transformer, {row['model']}: {row.get('error_message')}")
            continue
        times = f", {dense / row['ms']:.2f} x bfloat16" if dense else ""
        said.append(
            f"transformer, {row['model']}: {row['ms']:.1f} ms as a graph{times},"
            f" {row['launched_ms']:.1f} ms launched; finite {row['finite']}"
        )
    return said


def _rest(whole: dict) -> list[str]:
    said = []
    for tokens, found in whole.get("layers", {}).get("summary", {}).items():
        said.append(f"layers, M={tokens}: {found.get('times_as_fast_as')}")
    for row in whole.get("counters", {}).get("rows", []):
        said.append("counters: " + "  ".join(f"{k}={v}" for k, v in row.items()))
    for row in whole.get("memcheck", {}).get("rows", []):
        said.append(f"memcheck: {'clean' if row['ok'] else 'NOT clean'}, {row['last']}")
    return said
