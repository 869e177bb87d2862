// The entry: header, summary, tables and time.

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
  startMoreCharts(data.charts || [], groups);
  startNavigation();
}

start();
