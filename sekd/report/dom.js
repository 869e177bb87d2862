// Helpers that all parts use: elements, numbers, colours of lines.
// Text from the data reaches the page through make() and textNode() only, never as markup.

/** Text with every invisible or reordering character written out: control characters, ANSI escapes, bidi controls. */
function visibleText(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (character) => {
    const code = character.codePointAt(0);
    if (character === "\n" || character === "\t") return character;
    if (code < 0x20) return String.fromCharCode(0x2400 + code); // the control pictures: ␛ for ESC
    if (code === 0x7f) return "␡";
    const digits = code.toString(16).toUpperCase().padStart(4, "0");
    return code > 0xffff ? `\\u{${digits}}` : `\\u${digits}`;
  });
}

function textNode(text) {
  return document.createTextNode(visibleText(text));
}

/** An element. Children are nodes, text, or lists of them; null and false are left out. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else element.setAttribute(name, value === true ? "" : visibleText(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : textNode(child));
  }
  return element;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Three significant digits, thousands grouped, a true minus; a dash for what is no number. */
function formatNumber(value, digits = 3) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1000) text = Math.round(value).toLocaleString("en-US");
  else if (size !== 0 && size < 0.0005) text = value.toExponential(1);
  else text = String(Number(value.toPrecision(digits)));
  return text.replace(/^-/, "−");
}

/** A fixed number of digits, so that numbers below each other line up. */
function formatFixed(value, digits = 3) {
  if (!isNumber(value)) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

function formatSeconds(seconds) {
  if (!isNumber(seconds)) return "–";
  const digits = seconds >= 100 ? 0 : seconds >= 10 ? 1 : 2;
  return seconds.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function mean(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

function plural(count, word) {
  return `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;
}

/** Runs that differ in the seed only, in order of appearance. The place gives colour and dash. */
function groupRuns(runs) {
  const groups = new Map();
  for (const run of runs) {
    const label = run.group || run.label;
    if (!groups.has(label)) groups.set(label, { label, place: groups.size, runs: [] });
    groups.get(label).runs.push(run);
  }
  return [...groups.values()];
}

const SERIES_COLORS = 7; // as many as page.css defines
const DASHES = [null, "6 3", "2 3"]; // further groups repeat the colours, dashed

function seriesColor(place) {
  return `var(--series-${place % SERIES_COLORS})`;
}

function seriesDash(place) {
  return DASHES[Math.floor(place / SERIES_COLORS) % DASHES.length];
}

/** A short piece of a group's line, for legends. */
function lineKey(place) {
  const line = { x1: 0, y1: 5, x2: 22, y2: 5, "stroke-width": 2.5, "stroke-dasharray": seriesDash(place) };
  return makeSvg("svg", { class: "line-key", width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" },
    makeSvg("line", { ...line, style: { stroke: seriesColor(place) } }));
}

/** A name of the code in words: "reverse_kl" becomes "reverse KL". */
function plainWords(name) {
  return name.replaceAll("_", " ").replace(/\b(kl|ce|jsd|kd|ece)\b/g, (word) => word.toUpperCase());
}

/** A box that scrolls sideways by itself, so that the page never does. */
function scrollBox(label, ...children) {
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);
}

/** Fills a select with [value, text] pairs, and keeps its value if that is still there. */
function setOptions(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}
