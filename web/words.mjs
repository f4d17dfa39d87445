/**
 * The page's own sentences in the user's language. They are part of ComfyUI's translations:
 * locales/<language>/main.json, under "nibble".
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let languages = {}; // language -> {"nibble": {name: sentence}, ...}

/** Fetches them, once, in every language: the user may change it while the page is open. */
export async function loadWords() {
  const reply = await api.fetchApi("/i18n");
  if (reply.ok) languages = await reply.json();
}

/**
 * A sentence by its name, with {values} put in; what a language lacks is told in English, an
 * unknown name as it is.
 */
export function say(name, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  const text = languages[language]?.nibble?.[name] ?? languages.en?.nibble?.[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}
