// The entry: helpers that all parts use, then header, summary, tables and time.
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

/** A token's text with its whitespace shown, and the plain whitespace around it, which lets the text wrap as text. */
function tokenParts(run, id) {
  const raw = run.selection.vocab?.[id];
  if (raw === undefined || raw === null) return { before: "", shown: `⟨${id}⟩`, after: "" };
  if (raw === "") return { before: "", shown: "∅", after: "" };
  let shown = /^\p{M}/u.test(raw) ? `◌${raw}` : raw; // a combining mark would sit on the token before
  const before = /^ \S/.test(shown) ? " " : "";
  shown = shown.slice(before.length);
  if (/^\s+$/.test(shown)) shown = shown.replace(/[^\S\n\r]/g, (space) => space === "\t" ? "⇥" : "·");
  shown = shown.replaceAll("\n", "↵\n");
  const after = shown.endsWith("\n") ? "\n" : /^·+$/.test(shown) ? "\u200b" : "";
  return { before, shown: after === "\n" ? shown.slice(0, -1) : shown, after };
}

function tokenName(run, id) {
  const { before, shown } = tokenParts(run, id);
  return before.replace(" ", "·") + shown.replaceAll("\n", "");
}

/** The text of some tokens, its whitespace collapsed: for snippets. */
function joinTokens(run, ids) {
  return ids.map((id) => run.selection.vocab?.[id] ?? "").join("").replace(/\s+/g, " ");
}

function sampleLabel(run, { id, tokens, positions }) {
  return `${id}: ${joinTokens(run, tokens.slice(0, 24)).trim().slice(0, 48)}… (${plural(positions.length, "position")})`;
}

/** The text around the token that a position predicts, which is marked. */
function contextOf({ run, sample: { tokens } }, position, before, after) {
  const place = position + 1;
  return [make("span", {}, joinTokens(run, tokens.slice(Math.max(0, place - before), place))),
    make("mark", {}, tokenName(run, tokens[place]).replace(/^·(?=[^·])/, " ")),
    make("span", {}, joinTokens(run, tokens.slice(place + 1, place + 1 + after)))];
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

function readData() {
  return JSON.parse(document.getElementById("data").textContent);
}

const STATUSES = ["finished", "running", "unfinished"];

function drawHeader(data, runs) {
  document.title = visibleText(data.title || "sekd report");
  document.getElementById("title").replaceChildren(textNode(data.title || "sekd report"));
  const counts = STATUSES
    .map((status) => [status, runs.filter((run) => run.status === status).length])
    .filter(([, count]) => count)
    .map(([status, count]) => `${count} ${status}`);
  const line = [plural(runs.length, "run"), counts.length > 1 && counts.join(", ")].filter(Boolean).join(": ");
  document.getElementById("subtitle").replaceChildren(textNode(line));
  const notes = document.getElementById("notes");
  notes.hidden = !data.notes.length;
  notes.append(...data.notes.map((note) => make("li", {}, note)));
  document.getElementById("footer").replaceChildren(textNode(`Written by ${data.version || "sekd"}. This file needs no network.`));
}

function drawSummary(section, runs, groups) {
  const placeOf = new Map(groups.flatMap((group) => group.runs.map((run) => [run, group.place])));
  const cards = runs.map((run) => make("article", { class: "card", "data-run": run.id },
    make("header", {},
      make("h3", {}, groups.length > 1 && lineKey(placeOf.get(run)), make("bdi", {}, run.label)),
      make("span", { class: `badge ${STATUSES.includes(run.status) ? run.status : ""}` },
        run.status)),
    run.sentence && make("p", { class: "sentence" }, run.sentence),
    (run.notes || []).length > 0 && make("ul", { class: "notes" }, run.notes.map((note) => make("li", {}, note))),
    (run.facts || []).length > 0 && make("dl", { class: "facts" },
      run.facts.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value ?? "–")])),
    run.recipe && make("details", { class: "recipe" },
      make("summary", {}, "Recipe"), make("pre", { tabindex: 0 }, run.recipe))));
  section.querySelector(".cards").replaceChildren(...cards);
  if (!runs.length) section.append(make("p", { class: "empty" }, "No run was given."));
}

function drawTables(section, tables) {
  const content = section.querySelector(".content");
  for (const table of tables) {
    const columns = table.columns || [];
    const row = (cells) => make("tr", {}, cells.map((cell, place) => {
      const parts = [cell?.text ?? "–"];
      const rank = (word) => make("span", { class: "visually-hidden" }, ` (${word})`);
    const marked = cell?.best ? [make("b", {}, parts), rank("best")]
      : cell?.second ? [make("u", {}, parts), rank("second")] : parts;
      return place ? make("td", {}, marked) : make("th", { scope: "row" }, make("bdi", {}, marked));
    }));
    content.append(make("figure", { class: "table" },
      make("figcaption", {}, make("h3", {}, table.title), table.note && make("p", { class: "muted" }, table.note)),
      scrollBox(table.title || "Table", make("table", { class: "numbers" },
        make("thead", {}, make("tr", {}, columns.map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, (table.rows || []).map(row))))));
  }
  const hasMarks = tables.some((table) => (table.rows || []).flat().some((cell) => cell?.best || cell?.second));
  section.querySelector(".lead").hidden = !hasMarks;
  section.hidden = !tables.length;
}

const TIME_PARTS = ["data", "generation", "sync", "teacher", "student", "scoring", "loss", "backward", "optimizer", "other"];

function partColor(name, known) {
  const place = TIME_PARTS.includes(name) ? TIME_PARTS.indexOf(name) : TIME_PARTS.length - 1 - known.indexOf(name) % 5;
  return `var(--part-${place})`;
}

function drawTime(section, runs) {
  const timed = runs.map((run) => {
    const parts = (run.time || []).filter(([, seconds]) => isNumber(seconds) && seconds > 0);
    return { run, parts, total: parts.reduce((sum, [, seconds]) => sum + seconds, 0) }; // of a run without its end: shares
  }).filter(({ total }) => total > 0);
  section.hidden = !timed.length;
  if (!timed.length) return;
  const given = new Set(timed.flatMap(({ parts }) => parts.map(([name]) => name)));
  const names = [...TIME_PARTS.filter((name) => given.has(name)), ...[...given].filter((name) => !TIME_PARTS.includes(name))];
  const share = (seconds, total) => `${formatFixed(100 * seconds / total, seconds / total < 0.01 ? 1 : 0)} %`;

  const legend = make("ul", { class: "part-legend" }, names.map((name) => make("li", {},
    make("span", { class: "swatch", style: { background: partColor(name, names) } }), name)));
  const bars = make("div", { class: "time-bars" }, timed.map(({ run, parts, total }) => {
    const ordered = names.flatMap((name) => parts.filter(([part]) => part === name));
    const label = ordered.map(([name, seconds]) => `${name} ${share(seconds, total)}`).join(", ");
    return make("div", { class: "time-row" },
      make("span", { class: "time-name" }, make("bdi", {}, run.label)),
      make("div", { class: "time-bar", role: "img", "aria-label": `${run.label}: ${label}` },
        ordered.map(([name, seconds]) => make("span", {
          class: "time-part", title: `${name}: ${share(seconds, total)}`,
          style: { "flex-grow": String(seconds / total), background: partColor(name, names) },
        }, make("span", {}, share(seconds, total))))),
      make("span", { class: "time-total" }, run.time_unit ? `${formatSeconds(total)} s` : "shares so far"));
  }));
  const measured = timed.filter(({ run }) => run.time_unit);
  const table = measured.length > 0 && scrollBox("Seconds of each part", make("table", { class: "numbers" },
    make("thead", {}, make("tr", {}, ["Seconds", ...names, "sum"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, measured.map(({ run, parts, total }) => make("tr", {},
      make("th", { scope: "row" }, make("bdi", {}, run.label)),
      names.map((name) => make("td", {}, formatSeconds(new Map(parts).get(name)))),
      make("td", {}, make("b", {}, formatSeconds(total))))))));
  section.querySelector(".content").append(...[legend, bars, table].filter(Boolean));
}

/** Marks the section that is being read, and drops links to sections without content. */
function startNavigation() {
  const links = new Map();
  for (const link of document.querySelectorAll("nav.sections a")) {
    const section = document.querySelector(link.getAttribute("href"));
    if (section.hidden) link.remove();
    else links.set(section, link);
  }
  let waiting = false;
  const mark = () => {
    waiting = false;
    const atEnd = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 4;
    const passed = [...links.keys()].filter((section) => section.getBoundingClientRect().top < window.innerHeight * 0.3);
    const current = atEnd && window.scrollY > 0 ? [...links.keys()].at(-1) : passed.at(-1) || [...links.keys()][0];
    for (const [section, link] of links) {
      if (section === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  const later = () => {
    if (!waiting) requestAnimationFrame(mark);
    waiting = true;
  };
  window.addEventListener("scroll", later, { passive: true });
  window.addEventListener("resize", later);
  mark();
}

function start() {
  let data;
  try {
    data = readData();
  } catch (error) {
    const message = document.getElementById("error");
    message.replaceChildren(textNode(`The data of this report cannot be read: ${error.message}`));
    message.hidden = false;
    for (const section of document.querySelectorAll("main > section")) section.hidden = true;
    startNavigation();
    return;
  }
  const runs = data.runs || [];
  const groups = groupRuns(runs);
  drawHeader(data, runs);
  drawSummary(document.getElementById("summary"), runs, groups);
  drawTables(document.getElementById("tables"), data.tables || []);
  startViewer(document.getElementById("viewer"), runs);
  drawTime(document.getElementById("time"), runs);
  startCurves(document.getElementById("curves"), groups, data.names || {});
  startNavigation();
}

start();
