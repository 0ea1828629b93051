// The fields that say how tokens are drawn, and the panel with them, the system prompt and the tools.

import {button, element, errorBox, grow} from "./dom.js";
import {toolCard, toolsOf} from "./tools.js";

const FIELDS = [
  {name: "temperature", label: "Temperature", hint: "1", min: 0, max: 100, step: "any"},
  {name: "top_p", label: "Top p", hint: "1", min: 0, max: 1, step: "any"},
  {name: "top_k", label: "Top k", hint: "0: all", min: 0, step: 1},
  {name: "max_tokens", label: "Max tokens", hint: "default", min: 1, step: 1},
  {name: "seed", label: "Seed", hint: "drawn", step: 1},
];

/**
 * Returns the fields of settings. Empty ones are left to the server, whose value stands in the field.
 *
 * @param {object} settings changed in place
 * @param {string} prefix of ids, which must differ between two sets of fields
 */
export function samplingFields(settings, prefix, onChange) {
  const fields = FIELDS.map(({name, label, hint, ...limits}) => {
    const input = element("input", {
      type: "number",
      inputmode: "decimal",
      id: `${prefix}-${name}`,
      placeholder: hint,
      value: settings[name] ?? "",
      ...limits,
      oninput: () => {
        input.setAttribute("aria-invalid", String(!input.validity.valid));
        if (!input.validity.valid) return;
        settings[name] = input.value;
        onChange();
      },
    });
    return element("label", {class: "field"}, element("span", {class: "label"}, label), input);
  });
  return element("div", {class: "sampling"}, ...fields);
}

/** Returns a field that chooses a model. */
export function modelField(models, chosen, onChange, attributes = {}) {
  const options = models.map(({id}) => element("option", {value: id, selected: id === chosen}, id));
  return element("select", {...attributes, onchange: (event) => onChange(event.target.value)}, ...options);
}

/** Draws the panel into its drawer. */
export function drawSettings(drawer, app) {
  const content = [
    element("h2", {}, "Settings"),
    button("Close settings", "close", () => drawer.hide(), {quiet: true, class: "icon-button close"}),
  ];
  if (app.view === "chat") content.push(systemField(app));
  const sampling = samplingFields(app.settings, "sampling", () => app.saveSettings());
  content.push(element("section", {}, element("h3", {}, "Sampling"), sampling));
  if (app.view === "chat") content.push(toolSection(drawer, app));
  drawer.node.replaceChildren(...content);
}

function systemField(app) {
  const conversation = app.conversation;
  const area = element("textarea", {
    id: "system-prompt",
    rows: 3,
    value: conversation.system,
    placeholder: "None",
    oninput: () => {
      conversation.system = area.value;
      grow(area);
      app.saveConversation(conversation);
    },
  });
  const label = element("label", {for: "system-prompt"}, element("h3", {}, "System prompt"));
  return element("section", {}, label, area);
}

function toolSection(drawer, app) {
  const conversation = app.conversation;
  const change = () => {
    app.saveConversation(conversation);
    drawSettings(drawer, app);
  };
  const problem = element("div");
  const file = element("input", {
    type: "file",
    id: "tool-file",
    class: "only-heard",
    accept: ".json,application/json",
    onchange: async () => {
      try {
        conversation.tools = toolsOf(await file.files[0].text());
        change();
      } catch (error) {
        problem.replaceChildren(errorBox(error.message));
      }
      file.value = "";
    },
  });
  const pick = element("label", {class: "button", for: "tool-file"}, "Load tools from a file");
  const section = element("section", {class: "tools"}, element("h3", {}, "Tools"), file, pick, problem);
  if (!conversation.tools.length) {
    section.append(element("p", {class: "muted"}, "JSON: a list of functions with name, description and parameters."));
    return section;
  }

  const names = conversation.tools.map((tool) => tool.function.name);
  const choices = [["auto", "may call"], ["none", "must not call"], ["required", "must call"]];
  const options = [...choices, ...names.map((name) => [`=${name}`, `must call ${name}`])].map(([value, words]) =>
    element("option", {value, selected: value === conversation.toolChoice}, words),
  );
  const choose = (event) => {
    conversation.toolChoice = event.target.value;
    app.saveConversation(conversation);
  };
  const choice = element("select", {onchange: choose}, ...options);
  const parallel = element("input", {
    type: "checkbox",
    checked: conversation.parallelCalls,
    onchange: () => {
      conversation.parallelCalls = parallel.checked;
      app.saveConversation(conversation);
    },
  });
  section.append(
    button("Remove all", "trash", () => {
      Object.assign(conversation, {tools: [], toolChoice: "auto"});
      change();
    }),
    element("label", {class: "field"}, element("span", {class: "label"}, "The model"), choice),
    element("label", {class: "check"}, parallel, " several calls in a turn"),
    ...conversation.tools.map(toolCard),
  );
  return section;
}

/** Returns the fields of a request for the tools of a conversation. */
export function toolFields(conversation) {
  const {tools, toolChoice, parallelCalls} = conversation;
  if (!tools.length) return {};
  const names = tools.map((tool) => `=${tool.function.name}`);
  let choice = ["auto", "none", "required"].includes(toolChoice) ? toolChoice : "auto";
  if (names.includes(toolChoice)) choice = {type: "function", function: {name: toolChoice.slice(1)}};
  return {tools, tool_choice: choice, parallel_tool_calls: parallelCalls};
}
