/**
 * The report on a model's LoRAs: a bar of the patched layers by how they are computed, and the list
 * of them, most memory first.
 */
import { bytes, h, sum } from "../dom.mjs";
import { layerCount, layerList, legend, partsBy, section, statistics } from "./section.mjs";

const HOW = {
  branch: { swatch: "w4a4", label: "in the branch" },
  rows: { swatch: "w4a4", label: "in the branch, rows scaled" },
  dense: { swatch: "w4a16", label: "dense" },
  comfyui: { swatch: "keep", label: "16-bit layer" },
  refused: { swatch: "over", label: "does not fit" },
};

export function loraChart(chart) {
  const rows = chart.rows ?? [];
  const parts = partsBy(rows, "how", Object.keys(HOW));
  return section(
    chart,
    rows.length > 0 && [bar(rows, parts), partsLegend(parts)],
    statistics(chart.summary),
    rows.length > 0 && list(rows),
  );
}

function bar(rows, parts) {
  const label = parts.map(({ name, part }) => `${part.length} ${HOW[name].label}`).join(", ");
  return h(
    "div.nibble-bar",
    { role: "img", "aria-label": label },
    parts.map(({ name, part }) =>
      h(`span.nibble-${HOW[name].swatch}`, {
        style: `width:${(100 * part.length) / rows.length}%`,
      }),
    ),
  );
}

function partsLegend(parts) {
  return legend(
    parts.map(({ name, part }) => ({
      ...HOW[name],
      note: `${layerCount(part)}, ${bytes(sum(part, (row) => row.bytes))}`,
    })),
  );
}

function list(rows) {
  const isRefused = (row) => row.how === "refused";
  const sorted = [...rows].sort((a, b) => isRefused(b) - isRefused(a) || b.bytes - a.bytes);
  return layerList(sorted, "most memory first", (row) => (row.bytes ? [bytes(row.bytes)] : []));
}
