/**
 * Shows in a node what it is at: the layer or step, of how many, and the time that is left; after
 * Stop, what is done and that Run goes on from it. The events are those of
 * nodes/bridge/host/progress.py.
 */
import { api } from "../../scripts/api.js";
import { duration } from "./dom.mjs";
import { executedNode } from "./nodes.mjs";
import { drawNotice } from "./notices.mjs";
import { clear, show } from "./widget.mjs";
import { say } from "./words.mjs";

const working = new Set(); // nodes that show what they are at

/** Hears of progress from now on. */
export function watchProgress() {
  api.addEventListener("nibble_progress", ({ detail }) => {
    const node = executedNode(detail.node);
    if (!node) return;
    if (detail.stopped) working.delete(node);
    else working.add(node);
    show(node, "notice", drawNotice(detail.stopped ? stopped(detail) : atWork(detail)));
  });
  // a node that is through, or failed, has no more to tell; what was stopped stays
  for (const name of ["executing", "execution_success", "execution_interrupted"])
    api.addEventListener(name, ({ detail }) => {
      for (const node of [...working])
        if (executedNode(detail?.display_node ?? detail) !== node) rest(node);
    });
  api.addEventListener("execution_error", () => working.clear());
}

function rest(node) {
  working.delete(node);
  clear(node, "notice");
}

/** {title, name, done, count, unit, share, seconds} -> notice */
function atWork({ title, name, done, count, unit, share, seconds }) {
  const number = Math.min(done + 1, count);
  const place = unit
    ? say(`working_${unit}`, { number, count })
    : say("working_share", { percent: Math.round(100 * share) });
  const left = Number.isFinite(seconds) && say("left", { time: duration(Math.round(seconds)) });
  return {
    tone: "working",
    title: [say(title), place, left].filter(Boolean).join(" \u00b7 "),
    lines: name ? [name] : [],
    share,
  };
}

function stopped({ done, count, unit, resumes }) {
  const text = resumes && unit ? say(`stopped_${unit}`, { done, count }) : say("stopped");
  return { tone: "stopped", lines: [text], share: resumes && unit ? done / count : null };
}
