/** Axes: round limits and ticks for a range of values, and the lines and labels that show them. */
import { h, s } from "../dom.mjs";

/** The smallest of 1, 2 and 5 times a power of ten that is not below `rough` by more than 0.1 %. */
export function roundStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((size) => size * power >= 0.999 * rough);
}

/** An axis of decibels with at most six ticks: {low, high, ticks}. */
export function decibelAxis(values) {
  if (!values.length) return { low: 0, high: 30, ticks: [0, 10, 20, 30] };
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = [1, 2, 5, 10, 20, 50].find((size) => (most - least) / size <= 4) ?? 100;
  const low = Math.floor((least - step * 0.25) / step) * step;
  const high = Math.max(Math.ceil((most + step * 0.1) / step) * step, low + step);
  const ticks = [];
  for (let db = low; db <= high; db += step) ticks.push(db);
  return { low, high, ticks };
}

/** A line across the plot at each value; y: value -> pixels from the top. */
export function gridLines(values, y) {
  return values.map((value) =>
    s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(value), y2: y(value) }),
  );
}

/** The values beside those lines. */
export function tickLabels(values, y, label = String) {
  return values.map((value) =>
    h("span.nibble-tick", { style: `top:${y(value).toFixed(1)}px` }, label(value)),
  );
}

/** A vertical line through the whole plot, at a share of its width in per cent. */
export function verticalLine(kind, percent, height) {
  const at = `${percent}%`;
  return s(`line.nibble-${kind}`, { x1: at, x2: at, y1: 0, y2: height });
}

/** An SVG of the same size inside another, in which x runs from 0 to 100 whatever the width. */
export function stretched(height, ...content) {
  return s(
    "svg",
    { viewBox: `0 0 100 ${height}`, width: "100%", height, preserveAspectRatio: "none" },
    ...content,
  );
}
