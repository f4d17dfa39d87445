/**
 * The panel: one DOM widget at the end of a node, the same on the classic canvas and in Nodes 2.0,
 * that holds a notice, a chart, and what lies on the disk unfinished, whichever there are. The
 * content decides its own height (text wraps, lists open); the node follows.
 */
import { app } from "../../scripts/app.js";
import { h } from "./dom.mjs";

const NAME = "nibble_chart";
const SLOTS = ["notice", "chart", "files"]; // from the top
const WIDTH = 380; // pixels; a narrower node is widened once, when its first content arrives
const MARGIN = 10; // what the classic canvas leaves above and below a DOM widget
const MIDDLE = { button: 1, mask: 4 };

/** Shows an element in a slot of a node's panel, in place of an older one. */
export function show(node, slot, element) {
  const widget = panelOf(node) ?? addPanel(node);
  slotOf(widget, slot).replaceChildren(element);
}

/** Empties a slot; an empty panel leaves the node. */
export function clear(node, slot) {
  const widget = panelOf(node);
  if (!widget) return;
  slotOf(widget, slot).replaceChildren();
  if (SLOTS.every((name) => !slotOf(widget, name).hasChildNodes())) removePanel(node, widget);
}

const panelOf = (node) => node.widgets?.find((item) => item.name === NAME);
const slotOf = (widget, slot) => widget.element.firstElementChild.children[SLOTS.indexOf(slot)];

function addPanel(node) {
  const slots = SLOTS.map(() => h("div", { style: "display:contents" }));
  const style = "display:flex; flex-direction:column; gap:8px";
  const content = h("div.nibble-widget-content", { style }, slots);
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

function removePanel(node, widget) {
  const height = widget.element.offsetHeight + 2 * MARGIN;
  node.removeWidget(widget);
  follow(node, -height);
}

/** Lets the node grow and shrink with its panel; in Nodes 2.0 it follows its content by itself. */
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
