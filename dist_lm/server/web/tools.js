// Tools: functions from a file, and cards for them, for their calls and for the results.

import {element, icon} from "./dom.js";

/**
 * Returns the tools of a file in OpenAI's form.
 *
 * The file has a list, or an object with `tools` or `functions`. An element is OpenAI's {type, function}, or the
 * function alone: {name, description, parameters}. Throws an Error that names the element at fault.
 */
export function toolsOf(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is no JSON: ${error.message}.`);
  }
  const list = Array.isArray(value) ? value : value?.tools ?? value?.functions ?? [value];
  if (!Array.isArray(list)) throw new Error("Expected a list of functions.");
  const names = new Set();
  return list.map((item, index) => {
    const tool = item?.function ?? item;
    const where = `Function ${index + 1}`;
    if (typeof tool?.name !== "string" || !tool.name) throw new Error(`${where} has no name.`);
    if (names.has(tool.name)) throw new Error(`${where}: another one has the name ${tool.name}.`);
    names.add(tool.name);

    const parameters = tool.parameters ?? tool.input_schema ?? {type: "object", properties: {}};
    if (typeof parameters !== "object" || Array.isArray(parameters)) {
      throw new Error(`${where} (${tool.name}): parameters must be a JSON schema of an object.`);
    }
    return {type: "function", function: {name: tool.name, description: String(tool.description ?? ""), parameters}};
  });
}

/** Returns a card of a tool: its name, what it is for, its arguments. */
export function toolCard(tool) {
  const {name, description, parameters} = tool.function;
  const required = new Set(parameters.required ?? []);
  const rows = Object.entries(parameters.properties ?? {}).map(([argument, schema]) => [
    element("dt", {}, argument, required.has(argument) ? "" : element("span", {class: "muted"}, " optional")),
    element("dd", {}, typeWords(schema)),
  ]);
  return element(
    "article",
    {class: "tool-card"},
    element("h4", {}, icon("tool"), name),
    description ? element("p", {}, description) : null,
    rows.length ? element("dl", {class: "arguments"}, ...rows.flat()) : null,
  );
}

function typeWords(schema) {
  if (schema?.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  const kind = [schema?.type ?? "any"].flat().join(" or ");
  return kind === "array" && schema.items?.type ? `list of ${schema.items.type}` : kind;
}

/** Returns a card of a call with its arguments. */
export function callCard(call) {
  let values = null;
  try {
    values = JSON.parse(call.arguments || "{}");
  } catch {
    // Arguments that were cut off are shown as they are.
  }
  return card(call.name, `Call of ${call.name}`, argumentsOf(values, call.arguments));
}

function argumentsOf(values, text) {
  if (values === null || typeof values !== "object" || Array.isArray(values)) return element("pre", {}, text);
  const rows = Object.entries(values).map(([name, value]) => [
    element("dt", {}, name),
    element("dd", {}, typeof value === "string" ? value : JSON.stringify(value)),
  ]);
  if (!rows.length) return element("p", {class: "muted"}, "without arguments");
  return element("dl", {class: "arguments"}, ...rows.flat());
}

/** Returns a card of the result of a call. */
export function resultCard(name, content) {
  const text = element("pre", {tabindex: "0", "aria-label": `Result of ${name}`}, content || "(empty)");
  return card(name, `Result of ${name}`, text);
}

function card(name, label, content) {
  return element("article", {class: "tool-card", "aria-label": label}, element("h4", {}, icon("tool"), name), content);
}
