/** Finds the node on the canvas that ComfyUI speaks of. */
import { app } from "../../scripts/app.js";

/** By a locator: "12" is a node of the workflow, "<subgraph id>:12" one of a subgraph. */
export function locatedNode(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph ? app.rootGraph?.subgraphs?.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(Number(id)) ?? null;
}

/**
 * By its id in a run: "12" is a node of the workflow, "12:5" node 5 inside its subgraph node 12,
 * and so on down.
 */
export function executedNode(id) {
  const [last, ...outer] = String(id).split(":").reverse();
  const graph = outer
    .reverse()
    .reduce((inside, part) => inside?.getNodeById(Number(part))?.subgraph, app.rootGraph);
  return graph?.getNodeById(Number(last)) ?? null;
}
