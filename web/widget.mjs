/**
 * The chart widget: one DOM widget at the end of a node, the same on the classic canvas and in
 * Nodes 2.0. The content decides its own height (text wraps, lists open); the node follows.
 */
import { app } from "../../scripts/app.js";
import { drawChart } from "./charts.mjs";
import { h } from "./dom.mjs";

const NAME = "nibble_chart";
const WIDTH = 380; // pixels; a narrower node is widened once, when its first chart arrives
const MARGIN = 10; // what the classic canvas leaves above and below a DOM widget
const MIDDLE = { button: 1, mask: 4 };

/** Draws a chart in a node, replacing an older one. */
export function showChart(node, chart) {
  const widget = node.widgets?.find((item) => item.name === NAME) ?? addChartWidget(node);
  widget.element.firstElementChild.replaceChildren(drawChart(chart));
}

function addChartWidget(node) {
  const content = h("div.nibble-widget-content");
  const element = h("div.nibble-widget", content);
  let height = 0;
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false; // a report is not a setting: it is not saved with the workflow
  new ResizeObserver(() => {
    if (!content.offsetHeight || content.offsetHeight === height) return;
    const change = height && content.offsetHeight - height;
    height = content.offsetHeight;
    follow(node, change);
  }).observe(content);
  forwardGestures(element);
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  return widget;
}

/** Lets the node grow and shrink with its chart; in Nodes 2.0 it follows its content by itself. */
function follow(node, change) {
  if (!isVue())
    node.setSize([node.size[0], Math.max(node.size[1] + change, node.computeSize()[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

/**
 * On the classic canvas a DOM widget lies above the canvas: the wheel must still zoom and the
 * middle button still pan.
 */
function forwardGestures(element) {
  const pass = (method, wanted) => (event) => {
    if (!isVue() && wanted(event)) app.canvas[method](event);
  };
  element.addEventListener(
    "wheel",
    pass("processMouseWheel", () => true),
    { passive: false },
  );
  element.addEventListener(
    "pointerdown",
    pass("processMouseDown", (event) => event.button === MIDDLE.button),
  );
  element.addEventListener(
    "pointermove",
    pass("processMouseMove", (event) => (event.buttons & MIDDLE.mask) !== 0),
  );
  element.addEventListener(
    "pointerup",
    pass("processMouseUp", (event) => event.button === MIDDLE.button),
  );
}

const isVue = () => Boolean(app.extensionManager?.setting?.get("Comfy.VueNodes.Enabled"));
