/**
 * Shows errors in the nodes that they are of, with buttons for what can be done about them, and in
 * a toast: whether a node failed or ComfyUI refused the graph before it ran. Gone with the next
 * run.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { refusalsOf, remediesOf, sentenceOf, widgetOf } from "./errors.mjs";
import { executedNode } from "./nodes.mjs";
import { drawNotice } from "./notices.mjs";
import { clear, show } from "./widget.mjs";
import { say } from "./words.mjs";

const TOAST_MS = 12_000;
const shown = new Set(); // nodes with an error in them

/** Hears of errors from now on. */
export function watchFailures() {
  api.addEventListener("execution_error", ({ detail }) => {
    const node = executedNode(detail.node_id);
    if (isOurs(node)) report(node, [{ text: sentenceOf(detail), input: "" }]);
  });
  // ComfyUI tells of a refused graph in its answer alone, and of no event
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (...given) {
    for (const node of [...shown]) forget(node);
    try {
      const reply = await queuePrompt.apply(this, given);
      reportRefusals(reply?.node_errors);
      return reply;
    } catch (error) {
      reportRefusals(error?.response?.node_errors);
      throw error;
    }
  };
}

function reportRefusals(errors) {
  for (const [id, told] of Object.entries(errors ?? {})) {
    const node = executedNode(id);
    const refusals = refusalsOf(told);
    if (isOurs(node) && refusals.length) report(node, refusals);
  }
}

const isOurs = (node) => Boolean(node?.type?.startsWith("Nibble"));

/** Errors of one node, in it and in a toast. */
function report(node, errors) {
  shown.add(node);
  draw(node, errors);
  app.extensionManager?.toast?.add({
    severity: "error",
    summary: node.title,
    detail: errors.map(({ text }) => text).join("\n"),
    life: TOAST_MS,
  });
}

function draw(node, errors) {
  const actions = errors.flatMap((error) =>
    remediesOf(error, node).map((remedy) => button(remedy, node, errors, error)),
  );
  const told = errors.map(({ text }) => text);
  actions.push({ label: say("copy"), run: (pressed) => copy(told.join("\n"), pressed) });
  show(node, "notice", drawNotice({ tone: "error", lines: told, actions }));
}

function forget(node) {
  shown.delete(node);
  clear(node, "notice");
}

/** A remedy as a button that does it and takes its error away. */
function button(remedy, node, errors, error) {
  const solved = () => {
    const left = errors.filter((other) => other !== error);
    if (left.length) draw(node, left);
    else forget(node);
  };
  const labels = {
    set: () => say("set", { input: remedy.input, value: worded(remedy.to) }),
    refresh: () => say("refresh"),
    get: () => say("get_file", { name: remedy.name }),
    open: () => say("open_page"),
  };
  const label = labels[remedy.do]();
  if (remedy.url) return { label, href: remedy.url };
  if (remedy.do === "refresh")
    return { label, run: (pressed) => refresh(node, remedy.input, pressed, solved) };
  return { label, run: () => set(node, remedy, solved) };
}

const worded = (value) => (typeof value === "boolean" ? say(value ? "on" : "off") : String(value));

function set(node, { input, to }, solved) {
  const widget = widgetOf(node, input);
  widget.value = to;
  widget.callback?.(to, app.canvas, node);
  node.graph?.setDirtyCanvas(true, true);
  solved();
}

/** Reads the lists of files again; an error is solved where the choice is among them now. */
async function refresh(node, input, pressed, solved) {
  pressed.disabled = true;
  await app.refreshComboInNodes();
  pressed.disabled = false;
  const widget = widgetOf(node, input) ?? widgetOf(node, "model_name");
  if (widget?.options?.values?.includes?.(widget.value)) solved();
  else pressed.textContent = say("refreshed");
}

async function copy(text, pressed) {
  await navigator.clipboard.writeText(text);
  pressed.textContent = say("copied");
}
