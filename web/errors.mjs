/**
 * What ComfyUI tells of an error -> the sentence for people, and what can be done about it.
 *
 * A node that fails is told by the event execution_error; a graph that ComfyUI refuses before it
 * runs, by lists of errors for each node, in the answer to the prompt. The sentences of Nibble's
 * own refusals name their way out; what of it can be done by a button is read off them here.
 */
import { say } from "./words.mjs";

/** Exceptions whose message is written for people; of any other its type is told, too. */
const TOLD = /(^|\.)(FileRefused|DiskRefused|ValueError|ExecutionBlocked)$/;
const LINK = /https?:\/\/[^\s"'<>)]+[^\s"'<>).,;:]/;
const SWITCH = /switch '(\w+)' (on|off)/;
const CHOICE = /(?:choose|use|with|set) (?:the )?(?:preset )?'([^']+)'/g;
const REFRESH = /press R to refresh/;

/** An execution_error -> its sentence. */
export function sentenceOf({ exception_message: message = "", exception_type: type = "" }) {
  const text = message.trim().replaceAll(/\n{2,}/g, "\n");
  if (TOLD.test(type)) return text;
  const name = type.split(".").at(-1);
  return text ? `${name}: ${text}` : name;
}

/**
 * The errors of one node of a refused prompt -> [{text, input, to}, ...], each sentence once; to:
 * the value that its input may have, if the error names one.
 */
export function refusalsOf({ errors = [] }) {
  const told = errors.map(refusal);
  return told.filter(({ text }, at) => told.findIndex((other) => other.text === text) === at);
}

function refusal({ type, message, details = "", extra_info: extra = {} }) {
  const input = extra.input_name ?? "";
  const limits = extra.input_config?.[1] ?? {};
  const value = extra.received_value;
  switch (type) {
    case "required_input_missing":
      return { text: say("missing_input", { input }), input };
    case "value_not_in_list":
      return { text: say("not_in_list", { input, value: String(value) }), input, listed: false };
    case "value_smaller_than_min":
      return { text: say("too_small", { input, value, limit: limits.min }), input, to: limits.min };
    case "value_bigger_than_max":
      return { text: say("too_large", { input, value, limit: limits.max }), input, to: limits.max };
    case "return_type_mismatch":
      return { text: say("wrong_type", { input, type: extra.received_type }), input };
    case "invalid_input_type":
      return { text: say("no_number", { input, value: String(value) }), input };
    case "custom_validation_failed":
      return { text: details.replace(`${input} - `, ""), input };
    default:
      return { text: details ? `${message}: ${details}` : message, input };
  }
}

/**
 * What can be done about an error: [{do: "set", input, to} | {do: "refresh", input} | {do: "open",
 * url} | {do: "get", url, name}, ...].
 */
export function remediesOf({ text, input, to, listed = true }, node) {
  const found = settings(text, node);
  if (to !== undefined) found.push({ do: "set", input, to });
  if (!listed || REFRESH.test(text)) {
    const name = widgetOf(node, input)?.value;
    const model = (node.properties?.models ?? []).find((one) => one.name === name && one.url);
    if (model) found.push({ do: "get", url: model.url, name });
    found.push({ do: "refresh", input });
  }
  const url = LINK.exec(text)?.[0];
  if (url) found.push({ do: "open", url });
  return found;
}

/** The widgets that a sentence says to set: "switch 'overwrite' on", "choose the preset 'fast'". */
function settings(text, node) {
  const found = [];
  const [, name, on] = SWITCH.exec(text) ?? [];
  if (name && typeof widgetOf(node, name)?.value === "boolean")
    found.push({ do: "set", input: name, to: on === "on" });
  for (const [, value] of text.matchAll(CHOICE)) {
    const fitting = (node.widgets ?? []).filter((widget) => offers(widget, value));
    if (fitting.length === 1 && fitting[0].value !== value)
      found.push({ do: "set", input: fitting[0].name, to: value });
  }
  return found;
}

const offers = ({ options }, value) =>
  Array.isArray(options?.values) && options.values.includes(value);

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
