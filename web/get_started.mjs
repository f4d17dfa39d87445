/** Get Started's button: opens the template that the node has chosen, in a workflow of its own. */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { say } from "./words.mjs";

const BUTTON = "open_template";
// ComfyUI serves this file under the name of the pack's folder, and its templates too
const PACK = new URL(import.meta.url).pathname.split("/").at(-2);

app.registerExtension({
  name: "nibble.get_started",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "NibbleGetStarted") return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const result = before?.call(this, output, ...rest);
      const template = output?.nibble_template?.[0];
      if (template) offer(this, template);
      return result;
    };
  },
});

/** The node's button, which opens the latest choice. */
function offer(node, template) {
  let button = node.widgets?.find((widget) => widget.name === BUTTON);
  if (!button) {
    button = node.addWidget("button", BUTTON, null, () => open(button.template), {
      serialize: false,
    });
    button.serialize = false; // it is no setting
  }
  button.template = template;
  button.label = say("open_template", { template });
  node.setDirtyCanvas?.(true, true);
}

async function open(template) {
  const reply = await api.fetchApi(
    `/workflow_templates/${PACK}/${encodeURIComponent(template)}.json`,
  );
  if (!reply.ok) throw new Error(`The template ${template} is not there (${reply.status}).`);
  await app.loadGraphData(await reply.json(), true, true, template);
}
