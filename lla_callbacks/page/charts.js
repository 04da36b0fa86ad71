"use strict";
// Charts as SVG: their colours are those of the style sheet, so that light and dark need no code.
const SVG = "http://www.w3.org/2000/svg";
const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

function make(parent, tag, attributes = {}, text = null) {
  const inside = tag === "svg" || parent instanceof SVGElement;
  const made = inside ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  parent.appendChild(made);
  return made;
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
function power(k) { return "10" + [...String(k)].map((c) => RAISED[c]).join(""); }
function shown(v, digits = 4) {
  if (!known(v)) return "–";
  const size = Math.abs(v);
  if (v === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(v.toPrecision(digits))).replace("-", "−");
  const [mantissa, k] = v.toExponential(Math.min(2, digits - 1)).split("e");
  return Number(mantissa).toString().replace("-", "−") + "·" + power(Number(k));
}

function roundTicks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * unit).find((s) => s >= rough) || 10 * unit;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) found.push(Math.abs(v) < 1e-9 * step ? 0 : v);
  return found;
}
function logTicks(low, high) {
  const found = [], span = Math.log10(high / low), digits = span > 2.5 ? [1] : span > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  const stride = Math.max(1, Math.ceil(span / 6));
  for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k += stride)
    for (const d of digits) { const v = d * 10 ** k; if (v >= low && v <= high) found.push(v); }
  return found;
}

let clips = 0;
// A frame with axes; x and y map values to pixels.
function frame(card, height, x, y) {
  const width = Math.max(240, card.clientWidth - 34), left = 58, right = 10, top = 8, bottom = 26;
  const svg = make(card, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const X = (v) => left + ((v - x.low) / (x.high - x.low)) * (width - left - right);
  const turn = y.log ? Math.log10 : (v) => v;
  const [y0, y1] = [turn(y.low), turn(y.high)];
  const Y = (v) => top + (1 - (turn(v) - y0) / (y1 - y0)) * (height - top - bottom);
  const id = `clip${++clips}`;
  make(make(make(svg, "defs"), "clipPath", { id }), "rect", { x: left, y: top, width: width - left - right, height: height - top - bottom });
  for (const v of y.ticks || (y.log ? logTicks(y.low, y.high) : roundTicks(y.low, y.high, 4))) {
    make(svg, "line", { x1: left, x2: width - right, y1: Y(v), y2: Y(v), class: "rule" });
    make(svg, "text", { x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, shown(v, 3));
  }
  const marks = x.ticks || roundTicks(x.low, x.high, Math.max(2, width / 75)).map((v) => [v, shown(v, 6)]);
  for (const [v, text] of marks) {
    make(svg, "line", { x1: X(v), x2: X(v), y1: height - bottom, y2: height - bottom + 4, class: "axis" });
    make(svg, "text", { x: X(v), y: height - 8, "text-anchor": "middle" }, text);
  }
  make(svg, "line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" });
  const inner = make(svg, "g", { "clip-path": `url(#${id})` });
  return { svg, inner, X, Y, width, height, left, right, top, bottom };
}

function path(points) {
  let open = false;
  return points.map(([a, b]) => { if (!known(b)) { open = false; return ""; } const s = `${open ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`; open = true; return s; }).join("");
}
const ranged = (low, high, share = 0.06) => { const pad = (high - low || Math.abs(high) || 1) * share; return [low - pad, high + pad]; };
const extent = (values) => { const v = values.filter(known); return v.length ? [Math.min(...v), Math.max(...v)] : [0, 1]; };

// The last entry at or before a step; entries are ascending.
function entryAt(entries, step, of = (e) => e[0]) {
  let found = null;
  for (const e of entries) if (of(e) <= step) found = e;
  return found;
}

// One curve with its band over the steps of training; a click chooses the step.
function curveChart(grid, curve, page) {
  const card = make(grid, "div", { class: "card", "data-tag": curve.tag });
  const head = make(card, "h3");
  make(head, "span", { title: curve.tag }, curve.title);
  const value = make(head, "span", { class: "value" });
  const points = curve.points, values = points.map((p) => p[1]);
  const [least, most] = extent(values);
  const log = least > 0 && most > 50 * least;
  make(card, "p", {}, [page.named ? curve.tag.split("/")[0] : "", curve.note, log ? "log scale" : ""].filter(Boolean).join(" · ") || " ");
  let drawn = null;
  const draw = () => {
    if (drawn) drawn.svg.remove();
    // A band that is far wider than the curve is cut, not the curve flattened; one point has no curve.
    const lonely = points.length < 2, room = lonely ? Infinity : Math.max(most - least, 0.05 * Math.abs(most)) || 1;
    let low = Math.max(extent(points.map((p) => p[2]))[0], least - room), high = Math.min(extent(points.map((p) => p[3]))[1], most + room);
    if (curve.edge && high > 0.3 * curve.edge) high = Math.max(high, 1.05 * curve.edge);
    const y = log ? { low: least / 1.3, high: most * 1.3, log } : (([a, b]) => ({ low: a, high: b }))(ranged(low, high));
    const x = page.range[0] < page.range[1] ? { low: page.range[0], high: page.range[1] } : { low: page.range[0] - 1, high: page.range[0] + 1 };
    const f = frame(card, 176, x, y), floor = (v) => (log ? Math.max(v, y.low / 2) : v);
    const there = points.filter((p) => known(p[1]));
    if (there.some((p) => p[2] !== p[3])) {
      const round = [...there.map((p) => [f.X(p[0]), f.Y(floor(p[3]))]), ...there.slice().reverse().map((p) => [f.X(p[0]), f.Y(floor(p[2]))])];
      make(f.inner, "path", { d: path(round) + "Z", class: "band" });
      for (const p of there.length < 40 ? there : []) make(f.inner, "line", { x1: f.X(p[0]), x2: f.X(p[0]), y1: f.Y(floor(p[2])), y2: f.Y(floor(p[3])), class: "pin", style: `stroke-dasharray:none;stroke-opacity:.45${lonely ? ";stroke-width:7" : ""}` });
    }
    if (curve.edge && curve.edge < y.high && curve.edge > y.low) make(f.inner, "line", { x1: f.left, x2: f.width - f.right, y1: f.Y(curve.edge), y2: f.Y(curve.edge), class: "edge" });
    make(f.inner, "path", { d: path(there.map((p) => [f.X(p[0]), f.Y(p[1])])), class: "curve" });
    for (const p of there.length < 60 ? there : []) make(f.inner, "circle", { cx: f.X(p[0]), cy: f.Y(p[1]), r: 2.6, class: "dot" });
    f.cursor = make(f.inner, "line", { y1: f.top, y2: f.height - f.bottom, class: "cursor" });
    f.svg.addEventListener("click", (event) => {
      const box = f.svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * f.width;
      page.choose(x.low + ((at - f.left) / (f.width - f.left - f.right)) * (x.high - x.low));
    });
    drawn = f;
    show(page.step);
  };
  const show = (step) => {
    const p = entryAt(points, step);
    value.textContent = p ? shown(p[1]) : "";
    drawn.cursor.setAttribute("x1", drawn.X(step)); drawn.cursor.setAttribute("x2", drawn.X(step));
  };
  page.views.push({ draw, show });
}

// The density at a step; the axis is linear near zero and logarithmic beyond.
function spectrumChart(section, hessian, page) {
  const s = hessian.spectra, card = make(section, "div", { class: "card", "data-spectrum": hessian.name });
  const head = make(card, "h3");
  make(head, "span", {}, page.named ? hessian.name : "How many eigenvalues lie where");
  const value = make(head, "span", { class: "value" });
  make(card, "p", {}, "eigenvalues per band (log scale); blue curves up, orange down; dashed grey: the first and the last measurement");
  const n = s.frames[0].y.length, at = (i) => s.ends[0] + ((s.ends[1] - s.ends[0]) * i) / (n - 1);
  const most = Math.max(10, ...s.frames.flatMap((f) => f.y.filter(known)));
  const to = (v) => Math.asinh(v / s.linear), ticks = [[0, "0"]];
  for (let k = Math.ceil(Math.log10(3 * s.linear)); k < 300; k++) {
    const v = 10 ** k;
    if (to(v) > s.ends[1] && to(-v) < s.ends[0]) break;
    if (to(v) <= s.ends[1]) ticks.push([to(v), shown(v, 2)]);
    if (to(-v) >= s.ends[0]) ticks.push([to(-v), shown(-v, 2)]);
  }
  let f = null;
  const draw = () => { if (f) f.svg.remove(); f = frame(card, 300, { low: s.ends[0], high: s.ends[1], ticks }, { low: s.floor, high: most * 2, log: true }); f.moving = make(f.inner, "g"); show(page.step); };
  const area = (group, y, sign) => {
    let run = [];
    const close = () => {
      if (run.length > 1) {
        const ends = [run[run.length - 1][0], run[0][0]], base = f.Y(s.floor);
        make(group, "path", { d: path([...run, [ends[0], base], [ends[1], base]]) + "Z", class: sign < 0 ? "area down" : "area" });
      }
      run = [];
    };
    for (let i = 0; i < n; i++) {
      const [v, before] = [at(i), at(i - 1)];
      if (i && before < 0 && v >= 0 && known(y[i]) && known(y[i - 1])) {
        // Both colours meet at zero.
        const there = [f.X(0), f.Y(y[i - 1] + ((y[i] - y[i - 1]) * before) / (before - v))];
        run.push(there); close(); run.push(there);
      }
      if (known(y[i]) && sign * v >= 0) run.push([f.X(v), f.Y(y[i])]); else close();
    }
    close();
  };
  const show = (step) => {
    const now = entryAt(s.frames, step, (e) => e.step) || s.frames[0];
    f.moving.replaceChildren();
    for (const other of [s.frames[0], s.frames[s.frames.length - 1]]) if (other !== now) make(f.moving, "path", { d: path(other.y.map((v, i) => [f.X(at(i)), known(v) ? f.Y(v) : null])), class: "ghost" });
    area(f.moving, now.y, 1); area(f.moving, now.y, -1);
    make(f.moving, "line", { x1: f.X(0), x2: f.X(0), y1: f.top, y2: f.height - f.bottom, class: "axis" });
    for (const [[v, said], label, side] of [[now.top, "λmax", -1], [now.bottom, "λmin", 1]]) {
      if (!known(v)) continue;
      const x = f.X(to(v)), low = v < 0;
      make(f.moving, "line", { x1: x, x2: x, y1: f.top + 20, y2: f.height - f.bottom, class: low ? "pin down" : "pin" });
      const text = make(f.moving, "text", { x: x, y: f.top + 12, "text-anchor": side < 0 ? "end" : "start", class: low ? "strong low" : "strong up" }, `${label} ${said}`);
      text.setAttribute("x", Math.min(Math.max(x, f.left + 4), f.width - f.right - 4));
    }
    value.textContent = `step ${now.step}`;
  };
  page.views.push({ draw, show });
}

function lineChart(grid, line, page) {
  const card = make(grid, "div", { class: "card" }), head = make(card, "h3");
  make(head, "span", {}, line.name);
  const value = make(head, "span", { class: "value" });
  const note = make(card, "p");
  let f = null;
  const draw = () => show(page.step);
  const show = (step) => {
    if (f) f.svg.remove();
    const now = entryAt(line.frames, step, (e) => e.step) || line.frames[0], first = line.frames[0];
    const [low, high] = extent(now.y), [x0, x1] = extent(now.x);
    const log = low > 0 && high > 50 * low, [y0, y1] = ranged(low, high);
    f = frame(card, 176, { low: x0, high: x1 }, log ? { low: low / 1.3, high: high * 1.3, log } : { low: y0, high: y1 });
    if (first !== now) make(f.inner, "path", { d: path(first.x.map((v, i) => [f.X(v), known(first.y[i]) && (!log || first.y[i] > 0) ? f.Y(first.y[i]) : null])), class: "ghost" });
    make(f.inner, "path", { d: path(now.x.map((v, i) => [f.X(v), known(now.y[i]) ? f.Y(now.y[i]) : null])), class: "curve" });
    if (x0 < 0 && x1 > 0) make(f.inner, "line", { x1: f.X(0), x2: f.X(0), y1: f.top, y2: f.height - f.bottom, class: "cursor" });
    note.textContent = now.axis + (line.frames.length > 1 ? "; dashed grey: the first measurement" : "");
    value.textContent = `step ${now.step}${log ? " · log" : ""}`;
  };
  page.views.push({ draw, show });
}

// Traces of the layers as bars with two standard errors.
function layerChart(section, hessian, page) {
  const frames = hessian.layers, card = make(section, "div", { class: "card" }), head = make(card, "h3");
  make(head, "span", {}, page.named ? hessian.name : "Trace of each layer's block");
  const value = make(head, "span", { class: "value" });
  make(card, "p", {}, "whiskers: two standard errors; a layer's sum over parameters, so wide layers have more");
  const [least, most] = extent(frames.flatMap((f) => f.trace));
  let svg = null;
  const show = (step) => {
    if (svg) svg.remove();
    const now = entryAt(frames, step, (e) => e.step) || frames[0], row = 20, width = Math.max(260, card.clientWidth - 34);
    const names = Math.min(260, 0.36 * width), height = now.names.length * row + 26;
    svg = make(card, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    const [low, high] = [Math.min(0, least * 1.1), Math.max(most * 1.1, 1e-30)], X = (v) => names + ((v - low) / (high - low)) * (width - names - 10);
    for (const v of roundTicks(low, high, width / 150)) { make(svg, "line", { x1: X(v), x2: X(v), y1: 0, y2: height - 20, class: "rule" }); make(svg, "text", { x: X(v), y: height - 5, "text-anchor": "middle" }, shown(v, 3)); }
    now.names.forEach((name, i) => {
      const v = now.trace[i], error = 2 * (now.sem[i] || 0), y = i * row, letters = Math.floor(names / 6.6);
      const label = make(svg, "text", { x: names - 8, y: y + 14, "text-anchor": "end" }, name.length > letters ? "…" + name.slice(1 - letters) : name);
      make(label, "title", {}, name);
      if (!known(v)) return;
      make(svg, "rect", { x: Math.min(X(0), X(v)), y: y + 3, width: Math.abs(X(v) - X(0)), height: row - 6, rx: 3, class: v < 0 ? "bar down" : "bar" });
      make(svg, "line", { x1: X(Math.max(low, v - error)), x2: X(Math.min(high, v + error)), y1: y + row / 2, y2: y + row / 2, class: "whisker" });
    });
    value.textContent = `step ${now.step}`;
  };
  page.views.push({ draw: () => show(page.step), show });
}
