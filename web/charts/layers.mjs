/**
 * The report of a quantization, or of a VQ file's codebooks: the file's size, its figures, the
 * accuracy of each layer, and lists of the layers worth a look.
 */
import { bytes, h, sum } from "../dom.mjs";
import { keptLayers, leastAccurate, leastUsedCodebooks } from "./layer_lists.mjs";
import { layerPlot } from "./layer_plot.mjs";
import {
  ACTIONS,
  layerCount,
  legend,
  partsBy,
  plotTitle,
  section,
  statistics,
} from "./section.mjs";

const SHOWN = new Set(["size", "layers"]); // figures that the size bar and its legend tell
const NOTE = "signal-to-noise ratio in dB, higher is better; dashes: median";
const ON = {
  pictures: "on held-out pictures",
  noise: "on noise, not on pictures",
  synthetic: "estimated on synthetic inputs, not measured",
};
const bytesAfter = (rows) => sum(rows, (row) => row.bytes_after);

export function layersChart(chart) {
  const rows = chart.rows ?? [];
  const plot = rows.length ? layerPlot(rows) : null;
  return section(
    chart,
    sizeBar(rows, chart),
    statistics(chart.summary, SHOWN),
    plot && [plotTitle("Accuracy per layer", note(rows)), plot],
    plot && [leastAccurate(rows, plot.select), leastUsedCodebooks(rows, plot.select)],
    keptLayers(rows),
  );
}

/** What the dots are, and what they were measured on where the report tells. */
function note(rows) {
  const kinds = Object.keys(ON).filter((on) => rows.some((row) => row.on === on));
  return [...kinds.map((on) => ON[on]), NOTE].join("; ");
}

/** The size after as a part of the size before, split by what was done to the layers. */
function sizeBar(rows, chart) {
  const before = chart.bytes_before ?? sum(rows, (row) => row.bytes_before);
  const after = chart.bytes_after ?? bytesAfter(rows);
  if (!(before > 0 && after > 0)) return null;
  const parts = partsBy(rows, "action", Object.keys(ACTIONS));
  const width = (part) => `width:${(100 * bytesAfter(part)) / Math.max(before, after)}%`;
  return h(
    "div",
    h(
      "div.nibble-size",
      h("span.nibble-size-after", bytes(after)),
      h("span.nibble-size-before", `from ${bytes(before)}`),
      h("span.nibble-size-ratio", `${(before / after).toFixed(1)}\u00d7 smaller`),
    ),
    h(
      "div.nibble-bar",
      { role: "img", "aria-label": `${bytes(after)} of ${bytes(before)}` },
      parts.map(({ name, part }) => h(`span.nibble-${name}`, { style: width(part) })),
    ),
    legend(
      parts.map(({ name, part }) => ({
        swatch: name,
        label: ACTIONS[name],
        note: `${layerCount(part)}, ${bytes(bytesAfter(part))}`,
      })),
    ),
  );
}
