"""Each preset under every schedule of noise, beside as many plain steps.

The rule's unit is the same in all of them, so that quality is above balanced, balanced above fast,
and each above the plain run.
"""

import math

from bench.cache.drawing import STEPS, Bench


def by_schedule(bench: Bench) -> list[dict]:
    """PSNR in dB of pictures against the uncached run of the same schedule, means over prompts;
    capped: steps that were computed for the length of a row of skipped ones alone.
    """
    from nibble.nodes.bridge.caching.settings import PRESETS
    from noise_schedules import SCHEDULES

    return [
        row for name, schedule in SCHEDULES.items() for row in _rows(bench, name, schedule, PRESETS)
    ]


def _rows(bench: Bench, name: str, schedule, presets: dict[str, float]) -> list[dict]:
    from nibble.demo import metrics
    from nibble.nodes.bridge.caching.apply import apply_teacache
    from nibble.nodes.bridge.caching.run import flow_time
    from nibble.nodes.bridge.caching.settings import TeaCacheSettings

    model = schedule.on(bench.model)
    alone, data = bench.groups(False), flow_time(model).data

    def draw(patched, steps: int):
        sigmas = schedule.sigmas(model, steps)
        return bench.decode(bench.draw(patched, steps, alone, sigmas)[0] / data)

    reference, rows = draw(model, STEPS), []
    for preset, threshold in presets.items():
        records = {}

        def watch(record, records=records):
            records[id(record)] = record

        drawn = draw(apply_teacache(model, TeaCacheSettings(threshold), watch=watch), STEPS)
        computed = sum(record.computed for record in records.values()) / len(records)
        cells = [cell for record in records.values() for cell in record.cells.values()]
        judged = [cell for cell in cells if cell.why == "threshold"]
        plain = draw(model, math.ceil(computed))
        row = {
            "schedule": name,
            "preset": preset,
            "computed": round(computed, 2),
            "psnr": round(metrics.psnr(drawn, reference).mean().item(), 2),
            "plain_steps": math.ceil(computed),
            "plain_psnr": round(metrics.psnr(plain, reference).mean().item(), 2),
            "capped": f"{sum(cell.change < threshold for cell in judged)} of {len(judged)}",
        }
        rows.append(row)
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows
