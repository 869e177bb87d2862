// The selection viewer: a sample's tokens, coloured by a quantity of the positions that predict them.
// Pane A is always shown; pane B holds a second run or snapshot. Both share one colour scale.

const QUANTITIES = {
  student_entropy: "Student entropy H(q)",
  teacher_entropy: "Teacher entropy H(p)",
  forward_kl: "KL(p‖q)",
  reverse_kl: "KL(q‖p)",
  student_ce: "Cross-entropy −log q(y)",
};
const CHANGE = "change"; // of KL(p‖q) since the first snapshot
const MAX_SORTED = 200;

const viewer = {
  section: null,
  runs: [], // those with a selection
  panes: [],
  color: "student_entropy",
  scale: null,
  focus: null, // {pane, position}: what the keyboard is at; the detail returns to it
  hover: null, // {pane, position}
};

function startViewer(section, runs) {
  viewer.section = section;
  viewer.runs = runs.filter((run) => run.selection?.samples?.length && run.selection.steps?.length);
  if (!viewer.runs.length) {
    section.querySelector(".content").hidden = true;
    const note = section.querySelector(".empty");
    note.append("No run recorded a selection, so there are no texts to show.");
    note.hidden = false;
    return;
  }
  viewer.panes = [...section.querySelectorAll(".pane")].map(createPane);
  const [a] = viewer.panes;
  setOptions(control("run"), viewer.runs.map((run, place) => [place, run.label]));
  control("run").addEventListener("change", () => chooseRun(viewer.runs[control("run").value]));
  control("sample").addEventListener("change", () => {
    a.sample = a.run.selection.samples[control("sample").value];
    matchPanes();
  });
  control("color").addEventListener("change", () => { viewer.color = control("color").value; rescale(); });
  control("compare").addEventListener("change", chooseComparison);
  document.getElementById("viewer-sorted").addEventListener("toggle", drawSorted);
  chooseRun(viewer.runs[0]);
}

function control(name) {
  return document.getElementById(`viewer-${name}`);
}

function lastSnapshot(run) {
  return run.selection.steps.length - 1;
}

function createPane(element) {
  const pane = {
    name: element.dataset.pane, element, run: null, sample: null, snapshot: 0, before: null, drawn: null,
    spans: new Map(), // by position
    text: element.querySelector(".text"), slider: element.querySelector("input"),
  };
  pane.slider.addEventListener("input", () => setSnapshot(pane, Number(pane.slider.value)));
  pane.text.addEventListener("mouseover", (event) => {
    const position = positionOf(event.target);
    if (position !== null) look({ pane, position }, null);
  });
  pane.text.addEventListener("mouseleave", () => look(null, null));
  pane.text.addEventListener("click", (event) => event.target.closest(".token")?.focus());
  pane.text.addEventListener("focusin", (event) => {
    const position = positionOf(event.target);
    if (position !== null) look(null, { pane, position });
  });
  pane.text.addEventListener("keydown", (event) => moveWithKeys(pane, event));
  return pane;
}

function positionOf(node) {
  const token = node.closest(".token");
  return token ? Number(token.dataset.position) : null;
}

function moveWithKeys(pane, event) {
  if (event.altKey || event.ctrlKey || event.metaKey || !pane.spans.size) return;
  const order = [...pane.spans.keys()];
  const place = order.indexOf(positionOf(event.target));
  const target = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: order.length - 1 }[event.key];
  const turn = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (target === undefined && turn === undefined) return;
  event.preventDefault();
  if (turn) setSnapshot(pane, pane.snapshot + turn);
  else pane.spans.get(order[Math.max(0, Math.min(order.length - 1, target))]).focus();
}

function setSnapshot(pane, snapshot) {
  pane.snapshot = Math.max(0, Math.min(lastSnapshot(pane.run), snapshot));
  if (pane === viewer.panes[0]) follow();
  paintAll();
}

/** Another run in pane B goes to the snapshot whose step is nearest to that of pane A. */
function follow() {
  const [a, b] = viewer.panes;
  if (!b.run || b.run === a.run) return;
  const distances = b.run.selection.steps.map((step) => Math.abs(step - a.run.selection.steps[a.snapshot]));
  b.snapshot = distances.indexOf(Math.min(...distances));
}

function chooseRun(run) {
  const [a] = viewer.panes;
  const { samples, score_names: scores = [] } = run.selection;
  a.sample = samples.find((sample) => sample.id === a.sample?.id) || samples[0];
  a.run = run;
  a.snapshot = lastSnapshot(run);
  setOptions(control("sample"), samples.map((sample, place) => [place, sampleLabel(run, sample)]));
  control("sample").value = samples.indexOf(a.sample);
  const known = Object.keys(QUANTITIES).filter((key) => sortedValues(run, key).length);
  const keys = [...known, ...scores.map((name) => `score:${name}`).filter((key) => sortedValues(run, key).length)];
  if (lastSnapshot(run) > 0) keys.push(CHANGE);
  setOptions(control("color"), keys.map((key) => [key, quantityName(key)]));
  viewer.color = control("color").value;
  setOptions(control("compare"), [["", "nothing"],
    ...(lastSnapshot(run) ? [["snapshot", "another snapshot of this run"]] : []),
    ...viewer.runs.filter((other) => other !== run).map((other) => [viewer.runs.indexOf(other), other.label])]);
  a.before = null;
  chooseComparison();
}

/** Two snapshots of a run begin as its first and last one. Afterwards pane A shows what it showed before. */
function chooseComparison() {
  const [a, b] = viewer.panes;
  if (control("compare").value === "snapshot") [a.before, a.snapshot, b.snapshot] = [a.snapshot, 0, lastSnapshot(a.run)];
  else if (a.before !== null) [a.snapshot, a.before] = [a.before, null]; // also where the arrow keys pass that choice
  matchPanes();
}

/** Gives pane B the run of the comparison and the same sample, then draws everything. */
function matchPanes() {
  const [a, b] = viewer.panes;
  const choice = control("compare").value;
  b.run = choice === "" ? null : choice === "snapshot" ? a.run : viewer.runs[choice];
  b.element.hidden = !b.run;
  viewer.section.classList.toggle("comparing", Boolean(b.run));
  if (b.run) {
    b.sample = b.run === a.run ? a.sample : b.run.selection.samples.find((sample) => sample.id === a.sample.id) || null;
    b.snapshot = Math.min(b.snapshot, lastSnapshot(b.run));
    follow();
  }
  const weights = snapshotOf(a)?.weight || [];
  const first = a.sample.positions[Math.max(0, weights.findIndex((weight) => weight > 0))];
  const kept = viewer.focus && viewer.focus.pane === a && a.sample.positions.includes(viewer.focus.position);
  viewer.hover = null;
  if (!kept) viewer.focus = first === undefined ? null : { pane: a, position: first };
  for (const pane of shownPanes()) drawText(pane);
  rescale();
}

function shownPanes() {
  return viewer.panes.filter((pane) => pane.run);
}

/** Whether a position means the same in both panes: the texts are equal. */
function areLinked() {
  const [a, b] = viewer.panes;
  return Boolean(b.run && b.sample) && (a.sample === b.sample || a.sample.tokens.join() === b.sample.tokens.join());
}

function snapshotOf(pane, snapshot = pane.snapshot) {
  return pane.sample?.snapshots?.[snapshot];
}

function quantityName(key) {
  if (key === CHANGE) return "Change of KL(p‖q) since the first snapshot";
  return key.startsWith("score:") ? `Score: ${plainWords(key.slice(6))}` : QUANTITIES[key];
}

/** A sample's values of a quantity at a snapshot, one a position; null if there are none. */
function readValues(run, sample, snapshot, key) {
  const at = sample?.snapshots?.[snapshot];
  if (!at) return null;
  if (key.startsWith("score:")) return at.scores?.[(run.selection.score_names || []).indexOf(key.slice(6))] || null;
  if (key !== CHANGE) return at[key] || null;
  const first = sample.snapshots[0].forward_kl;
  return at.forward_kl?.map((value, i) => isNumber(value) && isNumber(first?.[i]) ? value - first[i] : null) || null;
}

const sortedCache = new Map();

/** The values of all samples and snapshots of a run, ascending. */
function sortedValues(run, key) {
  const name = `${viewer.runs.indexOf(run)} ${key}`;
  if (!sortedCache.has(name)) {
    const values = run.selection.samples.flatMap((sample) =>
      sample.snapshots.flatMap((_, snapshot) => readValues(run, sample, snapshot, key) || []));
    sortedCache.set(name, Float64Array.from(values.filter(isNumber)).sort());
  }
  return sortedCache.get(name);
}

function rescale() {
  const runs = [...new Set(shownPanes().map((pane) => pane.run))];
  const values = Float64Array.from(runs.flatMap((run) => [...sortedValues(run, viewer.color)])).sort();
  viewer.scale = colorScale(values, viewer.color === CHANGE);
  drawColorLegend(control("legend"), viewer.scale, quantityName(viewer.color), viewer.color.startsWith("score:") ? "" : "nats");
  paintAll();
}

function drawText(pane) {
  if (pane.drawn === pane.sample && pane.drawnRun === pane.run) return;
  [pane.drawn, pane.drawnRun] = [pane.sample, pane.run];
  pane.spans = new Map();
  pane.text.replaceChildren();
  if (!pane.sample) return;
  pane.text.setAttribute("aria-label", visibleText(`Tokens of sample ${pane.sample.id}, ${pane.run.label}`));
  const positions = new Set(pane.sample.positions);
  let given = null;
  pane.sample.tokens.forEach((id, place) => {
    const { before, shown, after } = tokenParts(pane.run, id);
    if (!positions.has(place - 1)) {
      if (!given) pane.text.append(given = make("span", { class: "given" }));
      given.append(textNode(before + shown), after);
      return;
    }
    given = null;
    const span = make("span", { class: "token", "data-position": place - 1, role: "button", tabindex: -1 }, shown);
    pane.spans.set(place - 1, span);
    pane.text.append(before, span, after);
  });
}

function paintAll() {
  for (const pane of shownPanes()) paint(pane);
  showDetail();
  drawSorted();
}

/** Colours a pane's tokens for its snapshot, and says in a line what the snapshot shows. */
function paint(pane) {
  const { run, sample } = pane;
  const { steps } = run.selection;
  const isComparing = shownPanes().length > 1;
  pane.element.querySelector(".pane-title").replaceChildren(isComparing ? make("span", { class: "pane-name" }, pane.name) : "",
    make("bdi", {}, run.label), make("span", { class: "muted" }, run.selection.source || ""));
  pane.slider.max = lastSnapshot(run);
  pane.slider.value = pane.snapshot;
  pane.slider.disabled = steps.length < 2;
  pane.slider.setAttribute("aria-valuetext", `after ${plural(steps[pane.snapshot], "step")}`);
  pane.element.querySelector("output").replaceChildren(textNode(`after ${plural(steps[pane.snapshot], "step")}`));
  pane.element.querySelector(".step-ticks").replaceChildren(...(steps.length > 12 ? [steps[0], steps.at(-1)] : steps)
    .map((step) => make("span", {}, step.toLocaleString("en-US"))));
  const line = pane.element.querySelector(".pane-line");
  const at = snapshotOf(pane);
  if (!at) {
    line.replaceChildren(textNode(sample ? "This snapshot is missing." : `This run has no sample ${viewer.panes[0].sample.id}.`));
    return;
  }
  line.replaceChildren(...summaryLine(pane));
  if (isComparing && pane.name === "B" && !areLinked()) line.append(" A shows another text.");
  const values = readValues(run, sample, pane.snapshot, viewer.color);
  const name = quantityName(viewer.color);
  sample.positions.forEach((position, i) => {
    const span = pane.spans.get(position);
    if (!span) return; // the last token predicts nothing that is shown
    const isChosen = at.weight?.[i] > 0;
    span.style.setProperty("--fill", colorAt(viewer.scale, values?.[i]));
    span.classList.toggle("chosen", isChosen);
    span.setAttribute("aria-label", visibleText(`${tokenName(run, sample.tokens[position + 1])}, position ${position}, `
      + `${name} ${formatFixed(values?.[i])}${isChosen ? ", chosen" : ""}`));
  });
}

function summaryLine(pane) {
  const { positions, snapshots } = pane.sample;
  const at = snapshotOf(pane);
  const chosen = positions.map((_, i) => at.weight?.[i] > 0);
  const count = chosen.filter(Boolean).length;
  const same = chosen.filter((isChosen, i) => isChosen && snapshots[0].weight?.[i] > 0).length;
  const bold = (text) => make("b", {}, text);
  const meanOf = (key, isAt = () => true) => bold(formatFixed(mean((at[key] || []).filter((_, i) => isAt(i)))));
  return [
    textNode(`After ${plural(pane.run.selection.steps[pane.snapshot], "step")}: `),
    bold(`${count} of ${positions.length}`), " positions chosen; mean entropy ", meanOf("student_entropy"),
    "; mean KL(p‖q) ", meanOf("forward_kl", (i) => chosen[i]), " at chosen",
    ...(count < positions.length ? [", ", meanOf("forward_kl", (i) => !chosen[i]), " at others"] : []),
    ...(pane.snapshot > 0 ? ["; ", bold(`${same} of ${count}`), " were also chosen in the first snapshot"] : []), ".",
  ];
}

/** Moves the pointer's look or the keyboard's focus, and shows that token. */
function look(hover, focus) {
  viewer.hover = hover;
  if (focus) viewer.focus = focus;
  showDetail();
}

/** The list of positions by the coloured quantity, built only while it is open. */
function drawSorted() {
  const details = control("sorted");
  details.querySelector("summary").replaceChildren(textNode(`Positions, sorted: ${quantityName(viewer.color)}`));
  const box = details.querySelector(".scroll");
  if (!details.open) return box.replaceChildren();
  const panes = shownPanes().filter((pane, i) => i === 0 || areLinked());
  const [a] = panes;
  const lists = panes.map((pane) => readValues(pane.run, pane.sample, pane.snapshot, viewer.color) || []);
  const order = a.sample.positions.map((position, i) => ({ position, i })).filter(({ i }) => isNumber(lists[0][i]))
    .sort((x, y) => lists[0][y.i] - lists[0][x.i]);
  const rows = order.slice(0, MAX_SORTED).map(({ position, i }, rank) => {
    const go = make("button", { type: "button", "aria-label": `Show position ${position} in the text` }, position);
    go.addEventListener("click", () => a.spans.get(position)?.focus());
    const row = make("tr", {}, make("td", {}, rank + 1), make("td", {}, go),
      make("td", { class: "snippet" }, make("div", {}, contextOf(a, position, 9, 9))),
      panes.map((pane, place) => [
        make("td", {}, formatFixed(lists[place][i])),
        make("td", { class: "bar" }, isNumber(lists[place][i]) && make("span", { style: {
          background: colorAt(viewer.scale, lists[place][i]), width: `${100 * Math.min(1, viewer.scale.place(lists[place][i]))}%` } })),
        make("td", {}, snapshotOf(pane).weight?.[i] > 0 ? "chosen" : "")]));
    row.addEventListener("mouseenter", () => look({ pane: a, position }, null));
    row.addEventListener("mouseleave", () => look(null, null));
    return row;
  });
  const valueHeads = panes.flatMap((pane) => [panes.length > 1 ? pane.name : "Value", "", "Chosen"]);
  const heads = ["Rank", "Position", "Token in its context", ...valueHeads].map((head) => make("th", { scope: "col" }, head));
  const cut = order.length > MAX_SORTED && `The first ${MAX_SORTED} of ${order.length} positions.`;
  box.replaceChildren(make("p", { class: "muted" }, cut || plural(order.length, "position")),
    make("table", { class: "numbers sorted" }, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, rows)));
}
