/**
 * Nibble's script in the ComfyUI front end: the charts that its nodes send are drawn inside the
 * nodes, and so are errors (failures.mjs) and what is under way (progress.mjs). What else it
 * registers is imported here.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { drawChart } from "./charts.mjs";
import { watchFailures } from "./failures.mjs";
import "./get_started.mjs";
import "./menu.mjs";
import { executedNode, locatedNode } from "./nodes.mjs";
import { watchProgress } from "./progress.mjs";
import "./search.mjs";
import { showUnfinished, watchUnfinished } from "./unfinished.mjs";
import { show } from "./widget.mjs";

const HISTORY = 20; // runs to look through, oldest first
const chartOf = (output) => output?.nibble_chart?.[0];
const draw = (node, chart) => show(node, "chart", drawChart(chart));

app.registerExtension({
  name: "nibble.charts",

  /** A node may send a chart while it works. */
  setup() {
    watchFailures();
    watchProgress();
    watchUnfinished();
    api.addEventListener("nibble_chart", ({ detail }) => {
      const node = executedNode(detail.node);
      if (node) draw(node, detail.chart);
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Nibble")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const result = before?.call(this, output, ...rest);
      if (chartOf(output)) draw(this, chartOf(output));
      return result;
    };
  },

  /** A quantize node that is put on the canvas tells what is unfinished, too. */
  nodeCreated(node) {
    if (node.type?.startsWith("NibbleQuantize")) setTimeout(showUnfinished); // once it is in it
  },

  /**
   * After a reload of the page the workflow is back without the outputs of its last run; ComfyUI's
   * history still has them.
   */
  async afterConfigureGraph() {
    const id = app.rootGraph?.id ?? app.graph?.id;
    if (!id) return;
    const reply = await api.fetchApi(`/history?max_items=${HISTORY}`);
    if (!reply.ok) return;
    const runs = Object.values(await reply.json()).filter(
      (run) => run.prompt?.[3]?.extra_pnginfo?.workflow?.id === id,
    );
    for (const [name, output] of runs.flatMap((run) => Object.entries(run.outputs ?? {}))) {
      const node = chartOf(output) && executedNode(name);
      if (node) draw(node, chartOf(output));
    }
  },

  /**
   * Called when a workflow tab comes back with the outputs of its last run: its nodes are new and
   * have no chart yet.
   */
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs ?? {})) {
      const node = chartOf(output) && locatedNode(locator);
      if (node) draw(node, chartOf(output));
    }
  },
});
