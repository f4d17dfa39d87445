/**
 * The report on a LoRA that was converted or merged: one column per layer, as high as the share of
 * the LoRA that the layer keeps, and the list of layers, largest loss first.
 */
import { bytes, h, s } from "../dom.mjs";
import { gridLines, tickLabels } from "./axes.mjs";
import {
  ACTIONS,
  layerCount,
  layerList,
  legend,
  partsBy,
  plotTitle,
  section,
  statistics,
} from "./section.mjs";

const HEIGHT = 96; // pixels of the axis, 0 to 100 %
const TICKS = [0, 0.5, 1];
const MANY = 120; // layers from which the columns touch
const y = (share) => HEIGHT * (1 - share);

export function retentionChart(chart) {
  const rows = chart.rows ?? [];
  const measured = rows.filter((row) => Number.isFinite(row.kept));
  return section(
    chart,
    measured.length > 0 && [
      plotTitle("Share of the LoRA kept, %", note(measured)),
      plot(measured),
      actionsLegend(measured),
    ],
    statistics(chart.summary),
    rows.length > 0 && list(rows),
  );
}

/** 0.985 -> "98.5 %"; two places just below 100 %, so that it does not read as all. */
function percent(share) {
  return `${(100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1)} %`;
}

function note(rows) {
  return rows.some((row) => Number.isFinite(row.nearest))
    ? "per layer; dashes: rounding to 4 bits alone"
    : "per layer";
}

function plot(rows) {
  const least = Math.min(...rows.map((row) => row.kept));
  const label = `Share kept by ${rows.length} layers, the least ${percent(least)}`;
  return h(
    "div.nibble-plot",
    tickLabels(TICKS, y, (share) => 100 * share),
    s(
      "svg",
      { height: HEIGHT + 2, role: "img", "aria-label": label },
      gridLines(TICKS, y),
      columns(rows),
      roundingLines(rows),
    ),
  );
}

function columns(rows) {
  const wide = 100 / rows.length;
  const gap = rows.length > MANY ? 0 : 0.2 * wide;
  return rows.map((row, index) =>
    s(
      `rect.nibble-cell.nibble-${row.action}`,
      {
        x: `${index * wide + gap / 2}%`,
        width: `${wide - gap}%`,
        y: y(row.kept),
        height: Math.max(1, HEIGHT * row.kept),
      },
      s("title", `${row.name}: ${percent(row.kept)}; ${row.why}`),
    ),
  );
}

/** A dash per layer at what rounding to the 4-bit grid alone would keep. */
function roundingLines(rows) {
  const wide = 100 / rows.length;
  return rows.map((row, index) => {
    if (!Number.isFinite(row.nearest)) return null;
    const level = y(row.nearest);
    const [left, right] = [`${index * wide}%`, `${(index + 1) * wide}%`];
    return s("line.nibble-median", { x1: left, x2: right, y1: level, y2: level });
  });
}

function actionsLegend(rows) {
  return legend(
    partsBy(rows, "action", Object.keys(ACTIONS)).map(({ name, part }) => ({
      swatch: name,
      label: ACTIONS[name],
      note: layerCount(part),
    })),
  );
}

function list(rows) {
  const sorted = [...rows].sort((a, b) => a.kept - b.kept);
  return layerList(sorted, "largest loss first", (row) => [
    percent(row.kept),
    h("br"),
    bytes(row.bytes),
  ]);
}
