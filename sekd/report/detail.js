// The token under the pointer or the focus: its text, its numbers, both models' likeliest tokens.

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

/** The panes that a look at a position of one pane concerns. */
function panesOf({ pane, position }) {
  const panes = areLinked() ? shownPanes() : [pane];
  return panes.filter((other) => other.sample?.positions.includes(position));
}

function showDetail() {
  const target = viewer.hover || viewer.focus;
  const panes = target ? panesOf(target) : [];
  for (const span of viewer.section.querySelectorAll(".token.active")) span.classList.remove("active");
  for (const pane of panes) pane.spans.get(target.position)?.classList.add("active");
  for (const pane of shownPanes()) { // one tab stop a text
    const stop = pane.spans.get(viewer.focus?.position) || [...pane.spans.values()][0];
    if (stop && stop !== pane.stop) pane.stop?.setAttribute("tabindex", -1);
    stop?.setAttribute("tabindex", 0);
    pane.stop = stop;
  }
  const detail = control("detail");
  if (!panes.length) return detail.replaceChildren(make("p", { class: "muted" }, "This sample has no position to show."));
  const { pane, position } = target;
  const name = (place) => tokenName(pane.run, pane.sample.tokens[place]);
  detail.replaceChildren();
  fill(detail, {}, [
    make("p", { class: "detail-token" }, make("bdi", {}, name(position + 1))),
    make("p", { class: "detail-position" }, `predicted by position ${position}`),
    make("p", { class: "context" }, contextOf(pane, position, 12, 5)),
    numbersTable(panes, position),
    panes.map((shown) => make("section", {},
      panes.length > 1 && make("h4", {}, make("span", { class: "pane-name" }, shown.name),
        ` after ${plural(shown.run.selection.steps[shown.snapshot], "step")}`),
      make("div", { class: "tops" }, topList(shown, position, "teacher"), topList(shown, position, "student")),
      (panes.length === 1 || shown.run !== panes[0].run || shown === panes[0]) && drifts(shown, position))),
  ]);
}

function numbersTable(panes, position) {
  const scores = [...new Set(panes.flatMap((pane) => pane.run.selection.score_names || []))].map((name) => `score:${name}`);
  const ranked = scores.length ? scores : [viewer.color];
  const read = (pane, key) => {
    const values = readValues(pane.run, pane.sample, pane.snapshot, key) || [];
    return { values, value: values[pane.sample.positions.indexOf(position)] };
  };
  const row = (name, show) => make("tr", {}, make("th", { scope: "row" }, name), panes.map((pane) => make("td", {}, show(pane))));
  const valueRow = (key) => row(quantityName(key), (pane) => formatFixed(read(pane, key).value));
  const rankName = (key) => scores.length > 1 ? quantityName(key).replace("Score", "Rank") : `Rank of the ${scores.length ? "score" : "colour"}`;
  return make("table", { class: "numbers" },
    panes.length > 1 && make("thead", {}, make("tr", {}, make("td"), panes.map((pane) => make("th", { scope: "col" }, pane.name)))),
    make("tbody", {},
      [...Object.keys(QUANTITIES), ...scores].map(valueRow),
      ranked.map((key) => row(rankName(key), (pane) => {
        const { values, value } = read(pane, key);
        return isNumber(value) ? `${1 + values.filter((other) => other > value).length} of ${values.length}` : "–";
      })),
      row("Weight", (pane) => {
        const weight = read(pane, "weight").value;
        return weight > 0 ? [make("b", {}, formatNumber(weight)), " chosen"] : formatNumber(weight);
      })));
}

function topList(pane, position, model) {
  const i = pane.sample.positions.indexOf(position);
  const top = snapshotOf(pane)?.[`${model}_top`];
  const next = pane.sample.tokens[position + 1];
  const rows = (top?.ids?.[i] || []).map((id, rank) => {
    const share = top.probs?.[i]?.[rank];
    return make("li", { class: id === next ? "next" : null, style: { "--share": `${100 * (isNumber(share) ? share : 0)}%` } },
      make("bdi", {}, tokenName(pane.run, id)), make("span", {}, formatFixed(share, 2)));
  });
  return make("div", {}, make("h5", {}, model === "teacher" ? "Teacher p" : "Student q"),
    rows.length ? make("ol", { class: `top-${model}` }, rows) : make("p", { class: "muted" }, "not recorded"));
}

/** How a position's entropy and divergence move over the snapshots. */
function drifts(pane, position) {
  const i = pane.sample.positions.indexOf(position);
  const { steps } = pane.run.selection;
  if (steps.length < 2) return null;
  const drift = (name, key) => sparkline(name, steps, pane.sample.snapshots.map((at) => at[key]?.[i]), pane.snapshot);
  return make("div", { class: "drifts" }, drift("Entropy", "student_entropy"), drift("KL(p‖q)", "forward_kl"));
}

/** A tiny line over snapshots from zero up, with its first and last value, and a dot at the current one. */
function sparkline(name, steps, values, current) {
  const [width, height] = [124, 34];
  const top = Math.max(...values.filter(isNumber), 1e-9);
  const span = steps.at(-1) - steps[0] || 1;
  const x = (i) => 4 + (steps[i] - steps[0]) / span * (width - 8);
  const y = (value) => height - 4 - value / top * (height - 8);
  const points = values.flatMap((value, i) => isNumber(value) ? [`${x(i).toFixed(1)},${y(value).toFixed(1)}`] : []);
  const ends = `${formatFixed(values[0], 2)} → ${formatFixed(values.at(-1), 2)}`;
  return make("figure", {}, make("figcaption", {}, name, make("span", {}, ends)),
    makeSvg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
      makeSvg("line", { x1: 0, x2: width, y1: height - 4, y2: height - 4 }),
      makeSvg("polyline", { points: points.join(" ") }),
      isNumber(values[current]) && makeSvg("circle", { cx: x(current), cy: y(values[current]), r: 3 })));
}
