// Curves: one small chart for each metric, one line for each group of runs, one crosshair for all charts.

const MAX_POINTS = 600; // of a drawn line; the crosshair reads all points of the data
const CHART_HEIGHT = 190;
const MARGIN = { top: 12, right: 12, bottom: 24, left: 46 };

/** The words and the unit of a logged number, as the data has them. Shares are shown in percent. */
function describeMetric(key, names) {
  const [name, unit] = names[key] ?? [key, ""];
  return { name, unit, factor: unit === "%" ? 100 : 1 };
}

/** The value of a run at a step, on the line between its logged points; null outside them. */
function interpolate(points, step) {
  const place = firstAtLeast(points, step, (point) => point[0]);
  if (place === points.length) return null;
  if (points[place][0] === step) return points[place][1];
  if (place === 0) return null;
  const [[x0, y0], [x1, y1]] = [points[place - 1], points[place]];
  return isNumber(y0) && isNumber(y1) ? y0 + (y1 - y0) * (step - x0) / (x1 - x0) : null;
}

function firstAtLeast(sorted, value, read = (item) => item) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (read(sorted[middle]) < value) low = middle + 1;
    else high = middle;
  }
  return low;
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

/** The stretches of a line without gaps, each cut to its share of MAX_POINTS. A bucket keeps its extremes, so spikes stay. */
function drawnStretches(points) {
  const stretches = [];
  let stretch = null;
  for (const point of points) {
    if (point.y === null) stretch = null;
    else if (stretch) stretch.push(point);
    else stretches.push(stretch = [point]);
  }
  if (points.length <= MAX_POINTS) return stretches;
  const size = Math.ceil(2 * points.length / MAX_POINTS);
  return stretches.map((whole) => {
    const kept = [];
    for (let start = 0; start < whole.length; start += size) {
      const bucket = whole.slice(start, start + size);
      const lowest = bucket.reduce((best, point) => point.y < best.y ? point : best);
      const highest = bucket.reduce((best, point) => point.y > best.y ? point : best);
      const low = Math.min(...bucket.map((point) => point.low));
      const high = Math.max(...bucket.map((point) => point.high));
      const ends = lowest === highest ? [lowest] : lowest.x < highest.x ? [lowest, highest] : [highest, lowest];
      kept.push(...ends.map(({ x, y }) => ({ x, y, low, high })));
    }
    return kept;
  });
}

/** Round numbers that cover a range. */
function niceTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
}

const curves = { groups: [], charts: [], hidden: new Set(), xDomain: [0, 1] };

function startCurves(section, groups, names) {
  const keys = new Set(groups.flatMap((group) => group.runs.flatMap((run) => Object.keys(run.curves || {}))));
  curves.groups = groups;
  for (const key of keys) {
    const metric = describeMetric(key, names);
    const series = groups.map((group) => groupSeries(group, key, metric.factor)).filter(Boolean);
    if (series.length) curves.charts.push(createChart(key, metric, series));
  }
  const lead = section.querySelector(".lead");
  if (!curves.charts.length) {
    lead.replaceChildren(textNode("No run has logged numbers."));
    section.querySelector(".hint").hidden = true;
    return;
  }
  const banded = curves.charts.some((chart) => chart.series.some((line) => line.seeds > 1));
  lead.replaceChildren(textNode("By optimizer step. Entropies and divergences are in nats."
    + (banded ? " A line is the mean over seeds; its band goes from the smallest to the largest seed." : "")));
  const xs = curves.charts.flatMap((chart) => chart.series.flatMap((line) => [line.points[0].x, line.points.at(-1).x]));
  curves.xDomain = [Math.min(0, ...xs), Math.max(...xs)];
  if (curves.xDomain[0] === curves.xDomain[1]) curves.xDomain[1] += 1;
  const shown = groups.filter((group) => curves.charts.some((chart) => chart.series.some((line) => line.group === group)));
  if (shown.length > 1 || banded) section.querySelector(".curve-legend").append(...shown.map(legendButton));
  section.querySelector(".charts").append(...curves.charts.map((chart) => chart.figure));
  for (const chart of curves.charts) drawChart(chart);
  // Charts are drawn for their width, so that their text keeps its size.
  new ResizeObserver(() => {
    for (const chart of curves.charts) if (chart.frame.clientWidth !== chart.width) drawChart(chart);
  }).observe(section.querySelector(".charts"));
}

function legendButton(group) {
  const seeds = group.runs.length > 1 && make("span", { class: "muted" }, ` ${group.runs.length} seeds`);
  const button = make("button", { type: "button", "aria-pressed": "true" }, lineKey(group.place), make("bdi", {}, group.label), seeds);
  button.addEventListener("click", () => {
    const isShown = curves.hidden.delete(group);
    if (!isShown) curves.hidden.add(group);
    button.setAttribute("aria-pressed", String(isShown));
    for (const chart of curves.charts) drawChart(chart);
  });
  return button;
}

function createChart(key, metric, series) {
  const title = make("h3", {}, metric.name, metric.unit && make("span", { class: "unit" }, ` ${metric.unit}`));
  const frame = make("div", { class: "chart", tabindex: 0, role: "group",
    "aria-label": `${metric.name}: line chart. Arrow keys read the values at each step.` });
  const readout = make("div", { class: "readout", hidden: true });
  const spoken = make("p", { class: "visually-hidden", "aria-live": "polite" });
  const figure = make("figure", { class: "small-multiple", "data-metric": key }, make("figcaption", {}, title), frame, spoken);
  const steps = [...new Set(series.flatMap((line) => line.points.filter((point) => point.y !== null).map((point) => point.x)))]
    .sort((a, b) => a - b);
  for (const line of series) line.stretches = drawnStretches(line.points);
  const chart = { metric, series, steps, figure, frame, readout, spoken, place: null, width: 0 };
  frame.addEventListener("pointermove", (event) => {
    const left = frame.getBoundingClientRect().left;
    showStep(chart, nearestPlace(steps, chart.stepAt(event.clientX - left)));
  });
  frame.addEventListener("pointerleave", () => { if (document.activeElement !== frame) hideStep(); });
  frame.addEventListener("focus", () => { if (chart.place === null) showStep(chart, steps.length - 1); });
  frame.addEventListener("blur", hideStep);
  frame.addEventListener("keydown", (event) => {
    const stride = event.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
    const place = chart.place ?? steps.length - 1;
    const target = { ArrowLeft: place - stride, ArrowRight: place + stride, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hideStep();
    if (target === undefined) return;
    event.preventDefault();
    showStep(chart, Math.max(0, Math.min(steps.length - 1, target)), true);
  });
  return chart;
}

function nearestPlace(sorted, value) {
  const place = Math.min(firstAtLeast(sorted, value), sorted.length - 1);
  return place > 0 && value - sorted[place - 1] < sorted[place] - value ? place - 1 : place;
}

function drawChart(chart) {
  const width = chart.width = chart.frame.clientWidth || 360;
  const lines = chart.series.filter((line) => !curves.hidden.has(line.group));
  let [low, high] = [Infinity, -Infinity];
  for (const line of lines) {
    for (const stretch of line.stretches) {
      for (const point of stretch) {
        low = Math.min(low, point.low);
        high = Math.max(high, point.high);
      }
    }
  }
  if (low > high) [low, high] = [0, 1];
  if (low > 0 && (low < 0.4 * high || chart.metric.unit === "%")) low = 0; // a true zero line, unless it would flatten the curve
  const room = Math.abs(high) * 0.1 || 1;
  if (high - low < 1e-9 * room) [low, high] = [low - room, high + room]; // a constant: in the middle
  const ticks = niceTicks(low, high, 4);
  const [yLow, yHigh] = [ticks[0], ticks.at(-1)];
  const [xLow, xHigh] = curves.xDomain;
  const right = width - MARGIN.right;
  const bottom = CHART_HEIGHT - MARGIN.bottom;
  const x = (step) => MARGIN.left + (step - xLow) / (xHigh - xLow) * (right - MARGIN.left);
  const y = (value) => bottom - (value - yLow) / (yHigh - yLow) * (bottom - MARGIN.top);
  chart.stepAt = (pixel) => xLow + (pixel - MARGIN.left) / (right - MARGIN.left) * (xHigh - xLow);
  chart.x = x;
  chart.y = y;
  const at = (step, value) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
  const path = (points, read = (point) => point.y) => points.map((point) => at(point.x, read(point))).join("L");

  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${CHART_HEIGHT}`, "aria-hidden": "true" });
  for (const tick of ticks) {
    svg.append(makeSvg("line", { class: tick === yLow ? "axis" : "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
      makeSvg("text", { x: MARGIN.left - 7, y: y(tick) + 3.5, "text-anchor": "end" }, formatTick(tick)));
  }
  const xTicks = niceTicks(xLow, xHigh, width < 340 ? 3 : 4).filter((tick) => tick <= xHigh && Number.isInteger(tick));
  for (const tick of xTicks) {
    svg.append(makeSvg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, formatTick(tick)));
  }
  for (const line of lines.filter(({ seeds }) => seeds > 1)) {
    const band = line.stretches.map((points) =>
      `M${path(points, (point) => point.high)}L${path([...points].reverse(), (point) => point.low)}Z`).join("");
    svg.append(makeSvg("path", { class: "band", d: band, style: { fill: seriesColor(line.group.place) } }));
  }
  for (const line of lines) {
    // "h0" makes a stretch of one point a dot
    const d = line.stretches.map((points) => `M${path(points)}${points.length === 1 ? "h0" : ""}`).join("");
    svg.append(makeSvg("path", { class: "line", d, "stroke-dasharray": seriesDash(line.group.place),
      style: { stroke: seriesColor(line.group.place) } }));
    const known = line.points.filter((point) => point.y !== null);
    if (known.length <= 12) {
      svg.append(...known.map((point) => makeSvg("circle", { cx: x(point.x), cy: y(point.y), r: 2.5,
        style: { fill: seriesColor(line.group.place) } })));
    }
  }
  chart.cursor = makeSvg("g", { class: "cursor" });
  svg.append(chart.cursor);
  chart.frame.replaceChildren(svg, chart.readout);
}

function formatTick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${formatNumber(value / 1e6)} M`;
  return size >= 10000 ? `${formatNumber(value / 1000)} k` : formatNumber(value);
}

/** Reads a step in all charts: a line and dots in each, the values beside the pointer's chart. */
function showStep(active, place, isSpoken = false) {
  const step = active.steps[place];
  active.place = place;
  for (const chart of curves.charts) {
    const shown = chart.series.filter((line) => !curves.hidden.has(line.group));
    const values = shown.map((line) => ({ line, point: readPoint(line, step) }));
    chart.cursor.replaceChildren(
      makeSvg("line", { x1: chart.x(step), x2: chart.x(step), y1: MARGIN.top, y2: CHART_HEIGHT - MARGIN.bottom }),
      ...values.filter(({ point }) => point).map(({ line, point }) => makeSvg("circle",
        { cx: chart.x(step), cy: chart.y(point.y), r: 3.5, style: { fill: seriesColor(line.group.place) } })));
    chart.readout.hidden = chart !== active;
    if (chart === active) drawReadout(chart, step, values, isSpoken);
  }
}

/** A line's values at a step, between its points if it was not logged there. */
function readPoint(line, step) {
  const [y, low, high] = ["y", "low", "high"].map((part) => {
    const place = firstAtLeast(line.points, step, (point) => point.x);
    const around = line.points.slice(Math.max(0, place - 1), place + 1).map((point) => [point.x, point[part]]);
    return interpolate(around, step);
  });
  return y === null ? null : { y, low, high };
}

function drawReadout(chart, step, values, isSpoken) {
  const rows = values.map(({ line, point }) => make("tr", {},
    make("td", {}, lineKey(line.group.place)),
    make("th", { scope: "row" }, make("bdi", {}, line.group.label)),
    make("td", {}, formatNumber(point?.y)),
    line.seeds > 1 && make("td", { class: "muted" }, point ? `${formatNumber(point.low)} – ${formatNumber(point.high)}` : "")));
  chart.readout.replaceChildren(make("p", {}, `step ${formatNumber(step)}`), make("table", {}, make("tbody", {}, rows)));
  // to the right of the crosshair, or to its left where the page ends
  const left = chart.frame.getBoundingClientRect().left + chart.x(step) + 12;
  const isLeft = left + chart.readout.offsetWidth > document.documentElement.clientWidth - 8;
  chart.readout.style.setProperty("left", isLeft ? "auto" : `${chart.x(step) + 12}px`);
  chart.readout.style.setProperty("right", isLeft ? `${chart.width - chart.x(step) + 12}px` : "auto");
  if (isSpoken) {
    const words = values.map(({ line, point }) => `${line.group.label} ${formatNumber(point?.y)}`).join(", ");
    chart.spoken.replaceChildren(textNode(`Step ${step}: ${words} ${chart.metric.unit}`));
  }
}

function hideStep() {
  for (const chart of curves.charts) {
    chart.cursor.replaceChildren();
    chart.readout.hidden = true;
    chart.place = null;
  }
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

/** A colour scale for ascending values, with the extremes (2 %) in the end colours, so that they use none up. */
function colorScale(values, isSigned) {
  const quantile = (share) => values.length ? values[Math.round(share * (values.length - 1))] : 0;
  const round = (value) => Number(value.toPrecision(2));
  if (isSigned) { // zero in the middle
    const high = round(Math.max(-quantile(0.01), quantile(0.99))) || 1;
    return { colors: "change", low: -high, high, values,
      place: (value) => Math.max(0, (value / high + 1) / 2), at: (place) => high * (2 * place - 1) };
  }
  const high = round(quantile(0.98)) || 1;
  const low = quantile(0) >= -1e-3 * Math.abs(high) ? 0 : round(quantile(0.02));
  const isSkewed = low === 0 && quantile(0.5) < 0.3 * high; // most values are small: a root shows them apart
  const power = isSkewed ? 0.5 : 1;
  const width = high - low || 1;
  return { colors: "heat", isSkewed, low, high, values,
    place: (value) => Math.max(0, (value - low) / width) ** power, at: (place) => low + width * place ** (1 / power) };
}

/** The colour of a value: between two of the five that page.css defines for each theme. */
function colorAt(scale, value) {
  if (!isNumber(value)) return "var(--no-value)";
  const place = 4 * Math.max(0, Math.min(1, scale.place(value)));
  const left = Math.min(3, Math.floor(place));
  const [from, to] = [left, left + 1].map((stop) => `var(--${scale.colors}-${stop})`);
  return `color-mix(in srgb, ${to} ${Math.round(100 * (place - left))}%, ${from})`;
}

function drawColorLegend(legend, scale, name, unit) {
  const notes = [unit, scale.isSkewed && "square-root scale"].filter(Boolean).join(", ");
  legend.querySelector(".legend-name").replaceChildren(make("b", {}, name), make("span", {}, notes));
  const colors = [0, 1, 2, 3, 4].map((stop) => `var(--${scale.colors}-${stop})`).join(", ");
  legend.querySelector(".ramp").style.background = `linear-gradient(to right, ${colors})`;
  legend.querySelector(".ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((place) => {
    const beyond = place === 1 && scale.values.at(-1) > scale.high ? "≥ "
      : place === 0 && scale.low !== 0 && scale.values[0] < scale.low ? "≤ " : "";
    return make("span", {}, beyond + formatNumber(scale.at(place), 2));
  }));
}
