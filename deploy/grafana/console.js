// What a console page draws: from Prometheus' series to SVG. Nothing here knows the page.

const COLOURS = [
  "#4878a8", "#d09030", "#508040", "#b04030", "#8060a0", "#309090",
  "#a07050", "#c070a0", "#707070", "#90a030", "#305070", "#d07070",
];
const HEIGHT = 160, LEFT = 62, RIGHT = 6, TOP = 8, BOTTOM = 18;
const LETTERS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];

// An expression for one node, or all of them if `node` is empty; rates over a step, or a minute.
function filled(expression, node, stepSeconds) {
  const pattern = node ? node.replace(/[.*+?^${}()|[\]\\]/g, "\\\\$&") : ".+";
  const window = Math.max(60, Math.ceil(stepSeconds)) + "s";
  return expression.replaceAll("$__rate_interval", window).replaceAll("$node", () => pattern);
}

const lastOf = (list) => list[list.length - 1];

function escaped(text) {
  return String(text).replace(/[&<>"]/g, (one) => "&#" + one.charCodeAt(0) + ";");
}

function legendOf(line, labels) {
  return line.legend.replace(/\{(\w+)\}/g, (_, name) => labels[name] ?? "");
}

// Of a step: shares that add up to 1.0001 do not need an axis to 1.5.
const SLACK = 0.02;

// The lowest round figure not visibly below `largest`, and the distance of its three to five ticks.
function axis(largest) {
  const whole = largest > 0 ? largest : 1;
  const magnitude = 10 ** Math.floor(Math.log10(whole));
  const step = [0.2, 0.5, 1, 2].map((share) => share * magnitude).find((one) => whole / one <= 5 + SLACK);
  return [Math.ceil(whole / step - SLACK) * step, step];
}

// One way to write every figure of a panel: its divisor, the divisor's letter, and what is counted.
function scale(top, unit) {
  if (unit === "percentunit") return [0.01, "", "%"];
  if (unit === "s") return top >= 1 ? [1, "", "s"] : top >= 1e-3 ? [1e-3, "", "ms"] : [1e-6, "", "µs"];
  const [size, letter] = LETTERS.find(([one]) => top >= one) ?? lastOf(LETTERS);
  if (unit === "bytes" || unit === "Bps") return [size, "", letter + (unit === "Bps" ? "B/s" : "B")];
  return [size, letter, unit.replace(/^suffix: /, "")];
}

function shown(value, [divisor, letter, name]) {
  const figure = value / divisor;
  const digits = figure !== 0 && Math.abs(figure) < 0.001 ? "< 0.001" : +figure.toPrecision(3);
  return [digits, figure === 0 ? "" : letter, name].filter((word) => word !== "").join(" ");
}

// As an axis has room for: what is counted only where it is short.
function mark(value, [divisor, letter, name]) {
  return shown(value, [divisor, letter, name.length > 4 ? "" : name]);
}

// [time, low, high] of each series that is drawn, laid upon those before it if they are stacked.
function bands(drawn, isStacked) {
  if (!isStacked) return drawn.map((one) => one.points.map(([time, value]) => [time, 0, value]));
  const times = [...new Set(drawn.flatMap((one) => one.points.map(([time]) => time)))].sort((a, b) => a - b);
  const sums = new Map(times.map((time) => [time, 0]));
  return drawn.map((one) => {
    const values = new Map(one.points);
    return times.map((time) => {
      const low = sums.get(time), high = low + (values.get(time) ?? 0);
      sums.set(time, high);
      return [time, low, high];
    });
  });
}

// Runs of points without a gap: a line over a gap would say what nobody measured.
function runs(points, stepSeconds) {
  const all = [];
  for (const point of points) {
    const last = all.length && lastOf(lastOf(all));
    if (last && point[0] - last[0] <= 1.5 * stepSeconds) lastOf(all).push(point);
    else all.push([point]);
  }
  return all;
}

function clock(time, seconds) {
  const when = new Date(time * 1000), two = (number) => String(number).padStart(2, "0");
  const day = two(when.getMonth() + 1) + "-" + two(when.getDate()) + " ";
  const minute = two(when.getHours()) + ":" + two(when.getMinutes());
  return seconds > 86400 / 2 ? day + minute : minute + ":" + two(when.getSeconds());
}

// The SVG of a panel and its legend; of a panel without data one sentence, and no axes.
// `found`: legend, isDrawn, and points [time, value] in order; `range`: start, end and step in s.
function draw(panel, found, range, width, absent) {
  // Of many parts of a whole, those that are never there would only hide the others.
  const present = found.filter((one) => !panel.stacked || one.points.some(([, value]) => value !== 0));
  const series = present.length ? present : found, omitted = found.length - series.length;
  const drawn = series.filter((one) => one.isDrawn);
  if (drawn.length === 0) return `<p class="absent">${escaped(absent)}</p>`;
  const areas = bands(drawn, panel.stacked);
  const [top, tick] = axis(Math.max(...areas.flat().map(([, , high]) => high)));
  const unit = scale(top, panel.unit);
  const x = (time) => (LEFT + (time - range.start) / (range.end - range.start) * (width - LEFT - RIGHT)).toFixed(1);
  const y = (value) => (HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)).toFixed(1);
  const parts = [];
  areas.forEach((area, index) => {
    const colour = COLOURS[index % COLOURS.length];
    for (const run of runs(area, range.step)) {
      const line = run.map(([time, , high]) => x(time) + " " + y(high)).join("L");
      const floor = run.map(([time, low]) => x(time) + " " + y(low)).reverse().join("L");
      if (panel.stacked) parts.push(`<path class="area" d="M${line}L${floor}Z" fill="${colour}" stroke="${colour}"/>`);
      else parts.push(`<path class="line" d="M${line}h0.1" stroke="${colour}"/>`);
    }
  });
  for (let value = 0; value <= top * 1.001; value += tick) {
    parts.push(`<path class="grid" d="M${LEFT} ${y(value)}H${width - RIGHT}"/><text x="${LEFT - 4}" y="${+y(value) + 3}" text-anchor="end">${mark(value, unit)}</text>`);
  }
  for (const [time, anchor] of [[range.start, "start"], [(range.start + range.end) / 2, "middle"], [range.end, "end"]]) {
    parts.push(`<text x="${x(time)}" y="${HEIGHT - 4}" text-anchor="${anchor}">${clock(time, range.end - range.start)}</text>`);
  }
  const items = series.map((one) => {
    const [time, value] = lastOf(one.points);
    const isNow = range.end - time <= 1.5 * range.step;
    const index = drawn.indexOf(one);
    const sign = index < 0 ? "" : `<i class="${panel.stacked ? "area" : "line"}" style="background:${COLOURS[index % COLOURS.length]}"></i>`;
    return `<li>${sign}${escaped(one.legend)}: ${isNow ? shown(value, unit) : "none now"}${index < 0 ? " (not drawn)" : ""}</li>`;
  });
  if (omitted) items.push(`<li>${omitted} more: 0 throughout</li>`);
  return `<svg width="${width}" height="${HEIGHT}" viewBox="0 0 ${width} ${HEIGHT}">${parts.join("")}</svg><ul>${items.join("")}</ul>`;
}
