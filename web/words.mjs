/**
 * The page's own sentences in the user's language. They are part of ComfyUI's translations:
 * locales/<language>/main.json, under "nibble".
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let words = {};

/** Fetches them, once; what a language lacks is told in English. */
export async function loadWords() {
  const reply = await api.fetchApi("/i18n");
  if (!reply.ok) return;
  const all = await reply.json();
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  words = { ...all.en?.nibble, ...all[language]?.nibble };
}

/** A sentence by its name, with {values} put in; an unknown name is told as it is. */
export function say(name, values = {}) {
  return (words[name] ?? name).replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}
