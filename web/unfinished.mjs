/**
 * Tells in the quantize nodes which files of stopped runs lie unfinished in ComfyUI's folders, and
 * removes them where the user says so twice. The routes are those of
 * nodes/bridge/host/unfinished.py.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { bytes, sum } from "./dom.mjs";
import { drawNotice } from "./notices.mjs";
import { clear, show } from "./widget.mjs";
import { say } from "./words.mjs";

const ROUTE = "/nibble/unfinished";
const size = (file) => file.bytes;

/** Looks again whenever a run has ended. */
export function watchUnfinished() {
  for (const name of ["execution_success", "execution_interrupted", "execution_error"])
    api.addEventListener(name, showUnfinished);
}

/** Asks the server, and shows what there is in every quantize node of the canvas. */
export async function showUnfinished() {
  const nodes = (app.rootGraph?._nodes ?? []).filter(({ type }) =>
    type?.startsWith("NibbleQuantize"),
  );
  if (!nodes.length) return;
  const reply = await api.fetchApi(ROUTE);
  if (!reply.ok) return;
  const { files } = await reply.json();
  for (const node of nodes)
    if (files.length) show(node, "files", drawNotice(notice(files)));
    else clear(node, "files");
}

function notice(files) {
  const idle = files.filter((file) => file.held_since === null);
  const held = files.filter((file) => file.held_since !== null).map(heldSince);
  const count = say(files.length === 1 ? "one_file" : "files", {
    count: files.length,
    size: bytes(sum(files, size)),
  });
  const lines = [say("files_why"), ...idle.map(({ name }) => name), ...held];
  const remove = { label: say("remove"), run: (button) => ask(button, idle) };
  return { tone: "files", title: count, lines, actions: idle.length ? [remove] : [] };
}

function heldSince({ name, held_since: since }) {
  const time = new Date(1000 * since).toLocaleTimeString([], {
    hour: "2-digit",
    minute: "2-digit",
  });
  return say("held", { name, time });
}

/** The first press asks, the second one removes. */
async function ask(button, files) {
  if (!button.dataset.asked) {
    button.dataset.asked = "yes";
    button.textContent = say("remove_sure", { size: bytes(sum(files, size)) });
    return;
  }
  button.disabled = true;
  const body = JSON.stringify({ names: files.map(({ name }) => name) });
  const headers = { "Content-Type": "application/json" };
  const reply = await api.fetchApi(`${ROUTE}/remove`, { method: "POST", headers, body });
  const { refused = [] } = await reply.json();
  if (refused.length) button.textContent = refused.join(" ");
  else await showUnfinished();
}
