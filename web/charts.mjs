/**
 * Draws the charts that Nibble's nodes report: chart JSON in (its schema is
 * nodes/bridge/host/charts.py), one HTML element out. Knows nothing of ComfyUI but the names of its
 * palette variables.
 */
import { blocksChart } from "./charts/blocks.mjs";
import { calibrationChart } from "./charts/calibration.mjs";
import { factsChart } from "./charts/facts.mjs";
import { layersChart } from "./charts/layers.mjs";
import { loraChart } from "./charts/lora.mjs";
import { lossChart } from "./charts/loss.mjs";
import { memoryChart } from "./charts/memory.mjs";
import { patchesChart } from "./charts/patches.mjs";
import { retentionChart } from "./charts/retention.mjs";
import { stripChart } from "./charts/strip.mjs";
import { h } from "./dom.mjs";
import { sheet } from "./style.mjs";

const KINDS = {
  blocks: blocksChart,
  calibration: calibrationChart,
  codebooks: layersChart,
  curve: lossChart,
  facts: factsChart,
  kept: retentionChart,
  layers: layersChart,
  lora: loraChart,
  memory: memoryChart,
  patches: patchesChart,
  strip: stripChart,
};

/** chart JSON -> element with a shadow root. An unknown kind still shows its title and summary. */
export function drawChart(chart) {
  const host = h("div.nibble-chart-host");
  const root = host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [sheet()];
  root.append((KINDS[chart.kind] ?? factsChart)(chart));
  return host;
}
