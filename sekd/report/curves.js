// Curves: one small chart for each metric, one line for each group of runs.

/** The words and the unit of a logged number, as the data has them. Shares are shown in percent. */
function describeMetric(key, names) {
  const [name, unit] = names[key] ?? [key, ""];
  return { name, unit, factor: unit === "%" ? 100 : 1 };
}

/** A group's points of a metric, {x, y, low, high}: the mean over its seeds, and their smallest and largest value. */
function groupSeries(group, key, factor) {
  const seeds = group.runs.map((run) => (run.curves?.[key] || []).filter((point) => isNumber(point?.[0]))
    .map(([step, value]) => [step, isNumber(value) ? value * factor : null]).sort((a, b) => a[0] - b[0]))
    .filter((points) => points.some((point) => point[1] !== null));
  if (seeds.length === 0) return null;
  if (seeds.length === 1) return { group, seeds: 1, points: seeds[0].map(([x, y]) => ({ x, y, low: y, high: y })) };
  const steps = [...new Set(seeds.flatMap((points) => points.map((point) => point[0])))].sort((a, b) => a - b);
  const points = steps.map((x) => {
    const values = seeds.map((seed) => interpolate(seed, x)).filter((value) => value !== null);
    if (!values.length) return { x, y: null, low: null, high: null };
    return { x, y: mean(values), low: Math.min(...values), high: Math.max(...values) };
  });
  return { group, seeds: seeds.length, points };
}

function startCurves(section, groups, names) {
  const keys = new Set(groups.flatMap((group) => group.runs.flatMap((run) => Object.keys(run.curves || {}))));
  const set = makeChartSet(STEPS);
  for (const key of keys) {
    const metric = describeMetric(key, names);
    const series = groups.map((group) => groupSeries(group, key, metric.factor)).filter(Boolean);
    if (series.length) createChart(set, key, metric, series);
  }
  const lead = section.querySelector(".lead");
  if (!set.charts.length) {
    lead.replaceChildren(textNode("No run has logged numbers."));
    section.querySelector(".hint").hidden = true;
    return;
  }
  const banded = set.charts.some((chart) => chart.series.some((line) => line.seeds > 1));
  lead.replaceChildren(textNode("By optimizer step. Entropies and divergences are in nats."
    + (banded ? " A line is the mean over seeds; its band goes from the smallest to the largest seed." : "")));
  const shown = groups.filter((group) => set.charts.some((chart) => chart.series.some((line) => line.group === group)));
  if (shown.length > 1 || banded) {
    section.querySelector(".curve-legend").append(...shown.map((group) =>
      legendButton(set, group, group.runs.length > 1 ? `${group.runs.length} seeds` : "")));
  }
  showCharts(set, section.querySelector(".charts"));
}

/** Shows or hides a group's lines in all charts of a set. */
function legendButton(set, group, note = "") {
  const button = make("button", { type: "button", "aria-pressed": "true" }, lineKey(group.place), make("bdi", {}, group.label),
    note && make("span", { class: "muted" }, ` ${note}`));
  button.addEventListener("click", () => {
    const isShown = set.hidden.delete(group);
    if (!isShown) set.hidden.add(group);
    button.setAttribute("aria-pressed", String(isShown));
    for (const chart of set.charts) drawChart(chart);
  });
  return button;
}

/** Draws the charts of several runs together: scores by budget, and memory. A line of a run has its colour. */
function startMoreCharts(charts, groups) {
  for (const { section: name, title, note, unit, x_name, is_discrete, lines } of charts) {
    const section = document.getElementById(name);
    const axis = { word: "point", name: (x) => `${formatNumber(x)} ${x_name}`, ticks: niceTicks };
    const set = makeChartSet(axis, is_discrete);
    const series = lines.map(({ label, points }, place) => ({
      group: groups.find((group) => group.label === label) ?? { label, place },
      seeds: points.some(([, , low, high]) => low !== high) ? 2 : 1,
      points: points.map(([x, y, low, high]) => ({ x, y, low, high })),
    }));
    createChart(set, title, { name: title, unit }, series);
    const box = make("div", { class: "charts" });
    section.querySelector(".content").append(make("div", { class: "more-chart" }, box,
      make("div", { class: "curve-legend" }, series.map(({ group }) => legendButton(set, group))),
      make("p", { class: "muted" }, note)));
    section.hidden = false;
    showCharts(set, box);
  }
}
