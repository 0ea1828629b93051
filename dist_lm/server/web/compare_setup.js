// The part of a comparison that says who answers: two sets of settings, the system prompt of both, blind or not.

import {element} from "./dom.js";
import {modelField, samplingFields} from "./settings.js";

/**
 * Returns the fields.
 *
 * @param {object} comparison {sides: two settings with a model, system, isBlind}, changed in place
 * @param {{id: string}[]} models
 * @param {boolean} isOpen
 * @param {() => void} onChange
 */
export function comparisonSetup(comparison, models, isOpen, onChange) {
  const columns = comparison.sides.map((side, index) => settingsOf(side, index, models, onChange));
  const system = element("textarea", {
    id: "compare-system",
    rows: 2,
    value: comparison.system,
    placeholder: "None",
    oninput: () => {
      comparison.system = system.value;
      onChange();
    },
  });
  const blind = element("input", {
    type: "checkbox",
    checked: comparison.isBlind,
    onchange: () => {
      comparison.isBlind = blind.checked;
      onChange();
    },
  });
  return element(
    "details",
    {class: "setup", open: isOpen},
    element("summary", {}, "Who answers, and how"),
    element("div", {class: "sides"}, ...columns),
    element("label", {class: "wide-field"}, element("span", {class: "label"}, "System prompt of both"), system),
    element("label", {class: "check"}, blind, " hide who is who until I have chosen"),
  );
}

function settingsOf(side, index, models, onChange) {
  const chooseModel = (name) => {
    side.model = name;
    onChange();
  };
  const model = modelField(models, side.model, chooseModel, {id: `compare-model-${index}`});
  return element(
    "fieldset",
    {},
    element("legend", {}, `Settings ${index + 1}`),
    element("label", {class: "field"}, element("span", {class: "label"}, "Model"), model),
    samplingFields(side, `compare-${index}`, onChange),
  );
}
