"""Methods compared at half the forwards and at half the time."""

AT = 14  # forwards at which methods are compared: half


def at(rows: list[dict], x: str, wanted: float) -> dict | None:
    """PSNR and SSIM of a method at `wanted` forwards or time, read between its two nearest
    settings; None outside what it reached.
    """
    rows = sorted(rows, key=lambda row: row[x])
    for low, high in zip(rows, rows[1:], strict=False):
        if low[x] <= wanted <= high[x]:
            share = (wanted - low[x]) / (high[x] - low[x]) if high[x] > low[x] else 1.0
            return {
                name: round(low[name] + share * (high[name] - low[name]), 4)
                for name in ("psnr", "psnr_min", "ssim", "ssim_min")
            }
    return None


def summarise(rows: list[dict]) -> list[dict]:
    """For each model and method: at half the forwards, and at half the time."""
    groups = dict.fromkeys((row["model"], row["method"]) for row in rows)
    out = []
    for model, method in groups:
        part = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        out.append(
            {
                "model": model,
                "method": method,
                "at_half_forwards": at(part, "forwards", AT),
                "at_half_time": at(part, "time", 0.5),
            }
        )
    return out
