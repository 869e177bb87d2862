// Small line charts. The charts of a set have the same x, and one crosshair reads them all.

const MAX_POINTS = 600; // of a drawn line; the crosshair reads all points of the data
const CHART_HEIGHT = 190;
const MARGIN = { top: 12, right: 12, bottom: 24, left: 46 };

/** Optimizer steps as x: ticks are whole numbers. */
const STEPS = {
  word: "step",
  name: (x) => `step ${formatNumber(x)}`,
  ticks: (low, high, count) => niceTicks(low, high, count).filter(Number.isInteger),
};

/** A set of charts. `isDiscrete`: x has a few values, drawn by their logarithms, and lines have none between them. */
function makeChartSet(axis, isDiscrete = false) {
  return { axis, isDiscrete, charts: [], hidden: new Set(), xDomain: [0, 1] };
}

/** Puts a set's charts into an element. */
function showCharts(set, element) {
  const xs = set.charts.flatMap((chart) => chart.series.flatMap((line) => [line.points[0].x, line.points.at(-1).x]));
  set.xDomain = [set.isDiscrete ? Math.min(...xs) : Math.min(0, ...xs), Math.max(...xs)];
  if (set.xDomain[0] === set.xDomain[1]) set.xDomain[1] += 1;
  element.append(...set.charts.map((chart) => chart.figure));
  for (const chart of set.charts) drawChart(chart);
  // Charts are drawn for their width, so that their text keeps its size.
  new ResizeObserver(() => {
    for (const chart of set.charts) if (chart.frame.clientWidth !== chart.width) drawChart(chart);
  }).observe(element);
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

/** A chart of lines {group: {label, place}, seeds, points: [{x, y, low, high}]} in a set. */
function createChart(set, key, metric, series) {
  const title = make("h3", {}, metric.name, metric.unit && make("span", { class: "unit" }, ` ${metric.unit}`));
  const frame = make("div", { class: "chart", tabindex: 0, role: "group",
    "aria-label": `${metric.name}: line chart. Arrow keys read the values at each ${set.axis.word}.` });
  const readout = make("div", { class: "readout", hidden: true });
  const spoken = make("p", { class: "visually-hidden", "aria-live": "polite" });
  const figure = make("figure", { class: "small-multiple", "data-metric": key }, make("figcaption", {}, title), frame, spoken);
  const steps = [...new Set(series.flatMap((line) => line.points.filter((point) => point.y !== null).map((point) => point.x)))]
    .sort((a, b) => a - b);
  for (const line of series) line.stretches = drawnStretches(line.points);
  const chart = { set, metric, series, steps, figure, frame, readout, spoken, place: null, width: 0 };
  frame.addEventListener("pointermove", (event) => {
    const left = frame.getBoundingClientRect().left;
    showStep(chart, nearestPlace(steps, chart.stepAt(event.clientX - left)));
  });
  frame.addEventListener("pointerleave", () => { if (document.activeElement !== frame) hideStep(set); });
  frame.addEventListener("focus", () => { if (chart.place === null) showStep(chart, steps.length - 1); });
  frame.addEventListener("blur", () => hideStep(set));
  frame.addEventListener("keydown", (event) => {
    const stride = event.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
    const place = chart.place ?? steps.length - 1;
    const target = { ArrowLeft: place - stride, ArrowRight: place + stride, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hideStep(set);
    if (target === undefined) return;
    event.preventDefault();
    showStep(chart, Math.max(0, Math.min(steps.length - 1, target)), true);
  });
  set.charts.push(chart);
  return chart;
}

function nearestPlace(sorted, value) {
  const place = Math.min(firstAtLeast(sorted, value), sorted.length - 1);
  return place > 0 && value - sorted[place - 1] < sorted[place] - value ? place - 1 : place;
}

function drawChart(chart) {
  const width = chart.width = chart.frame.clientWidth || 360;
  const { set } = chart;
  const lines = chart.series.filter((line) => !set.hidden.has(line.group));
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
  const scale = set.isDiscrete ? Math.log : (value) => value;
  const unscale = set.isDiscrete ? Math.exp : (value) => value;
  const [xLow, xHigh] = set.xDomain.map(scale);
  const right = width - MARGIN.right;
  const bottom = CHART_HEIGHT - MARGIN.bottom;
  const x = (step) => MARGIN.left + (scale(step) - xLow) / (xHigh - xLow) * (right - MARGIN.left);
  const y = (value) => bottom - (value - yLow) / (yHigh - yLow) * (bottom - MARGIN.top);
  chart.stepAt = (pixel) => unscale(xLow + (pixel - MARGIN.left) / (right - MARGIN.left) * (xHigh - xLow));
  chart.x = x;
  chart.y = y;
  const at = (step, value) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
  const path = (points, read = (point) => point.y) => points.map((point) => at(point.x, read(point))).join("L");

  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${CHART_HEIGHT}`, "aria-hidden": "true" });
  for (const tick of ticks) {
    svg.append(makeSvg("line", { class: tick === yLow ? "axis" : "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
      makeSvg("text", { x: MARGIN.left - 7, y: y(tick) + 3.5, "text-anchor": "end" }, formatTick(tick)));
  }
  const xTicks = set.isDiscrete ? chart.steps
    : set.axis.ticks(xLow, xHigh, width < 340 ? 3 : 4).filter((tick) => tick <= xHigh);
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
  const { set } = active;
  for (const chart of set.charts) {
    const shown = chart.series.filter((line) => !set.hidden.has(line.group));
    const values = shown.map((line) => ({ line, point: readPoint(line, step, set.isDiscrete) }));
    chart.cursor.replaceChildren(
      makeSvg("line", { x1: chart.x(step), x2: chart.x(step), y1: MARGIN.top, y2: CHART_HEIGHT - MARGIN.bottom }),
      ...values.filter(({ point }) => point).map(({ line, point }) => makeSvg("circle",
        { cx: chart.x(step), cy: chart.y(point.y), r: 3.5, style: { fill: seriesColor(line.group.place) } })));
    chart.readout.hidden = chart !== active;
    if (chart === active) drawReadout(chart, step, values, isSpoken);
  }
}

/** A line's values at a step, between its points if it has none there. */
function readPoint(line, step, isDiscrete) {
  if (isDiscrete) return line.points.find((point) => point.x === step) ?? null;
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
  chart.readout.replaceChildren(make("p", {}, chart.set.axis.name(step)), make("table", {}, make("tbody", {}, rows)));
  // to the right of the crosshair, or to its left where the page ends
  const left = chart.frame.getBoundingClientRect().left + chart.x(step) + 12;
  const isLeft = left + chart.readout.offsetWidth > document.documentElement.clientWidth - 8;
  chart.readout.style.setProperty("left", isLeft ? "auto" : `${chart.x(step) + 12}px`);
  chart.readout.style.setProperty("right", isLeft ? `${chart.width - chart.x(step) + 12}px` : "auto");
  if (isSpoken) {
    const words = values.map(({ line, point }) => `${line.group.label} ${formatNumber(point?.y)}`).join(", ");
    chart.spoken.replaceChildren(textNode(`${chart.set.axis.name(step)}: ${words} ${chart.metric.unit}`));
  }
}

function hideStep(set) {
  for (const chart of set.charts) {
    chart.cursor.replaceChildren();
    chart.readout.hidden = true;
    chart.place = null;
  }
}
