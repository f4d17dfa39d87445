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

const working = new Map(); // node at work -> what it told last

/** Hears of progress from now on. */
export function watchProgress() {
  api.addEventListener("nibble_progress", ({ detail }) => {
    const node = executedNode(detail.node);
    if (!node) return;
    if (detail.stopped) stop(node, detail);
    else {
      working.set(node, detail);
      show(node, "notice", drawNotice(atWork(detail)));
    }
  });
  // a node that is through has no more to tell
  api.addEventListener("executing", ({ detail }) => {
    const running = executedNode(detail?.display_node ?? detail);
    for (const node of working.keys()) if (node !== running) rest(node);
  });
  api.addEventListener("execution_success", () => [...working.keys()].forEach(rest));
  // Stop may reach ComfyUI's own code first, which tells nothing of what is done
  api.addEventListener("execution_interrupted", () =>
    working.forEach((told, at) => stop(at, told)),
  );
  // failures.mjs has drawn the error in the notice's place
  api.addEventListener("execution_error", () => working.clear());
}

function stop(node, told) {
  working.delete(node);
  show(node, "notice", drawNotice(stopped(told)));
}

function rest(node) {
  working.delete(node);
  clear(node, "notice");
}

/** {title, name, done, count, unit, share, seconds} -> notice */
function atWork({ title, name, done, count, unit, share, seconds }) {
  const number = Math.min(done + 1, count);
  const place =
    unit && count
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
  const text = resumes && count ? say(`stopped_${unit}`, { done, count }) : say("stopped");
  return { tone: "stopped", lines: [text], share: resumes && count ? done / count : null };
}
