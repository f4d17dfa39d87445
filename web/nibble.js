/**
 * Nibble's script in the ComfyUI front end: the charts that its nodes send are drawn inside the
 * nodes. What else it registers is imported here.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import "./get_started.mjs";
import "./search.mjs";
import { showChart } from "./widget.mjs";

const HISTORY = 20; // runs to look through, oldest first
const chartOf = (output) => output?.nibble_chart?.[0];

app.registerExtension({
  name: "nibble.charts",

  /** A node may send a chart while it works. */
  setup() {
    api.addEventListener("nibble_chart", ({ detail }) => {
      const node = runningNode(detail.node);
      if (node) showChart(node, detail.chart);
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Nibble")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const result = before?.call(this, output, ...rest);
      if (chartOf(output)) showChart(this, chartOf(output));
      return result;
    };
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
      const node = chartOf(output) && runningNode(name);
      if (node) showChart(node, chartOf(output));
    }
  },

  /**
   * Called when a workflow tab comes back with the outputs of its last run: its nodes are new and
   * have no chart yet.
   */
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs ?? {})) {
      const node = chartOf(output) && findNode(locator);
      if (node) showChart(node, chartOf(output));
    }
  },
});

/** "12" is a node of the workflow, "<subgraph id>:12" one of a subgraph. */
function findNode(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph ? app.rootGraph?.subgraphs?.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(Number(id)) ?? null;
}

/** "12" is a node of the workflow, "12:5" node 5 inside its subgraph node 12, and so on down. */
function runningNode(id) {
  const [last, ...outer] = String(id).split(":").reverse();
  const graph = outer
    .reverse()
    .reduce((inside, part) => inside?.getNodeById(Number(part))?.subgraph, app.rootGraph);
  return graph?.getNodeById(Number(last)) ?? null;
}
