// The loss over a plane as a surface that turns: painted far to near on a canvas.
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
function viridis(share, light = 1) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mix = VIRIDIS[i].map((a, k) => Math.round(Math.min(255, (a + (VIRIDIS[i + 1][k] - a) * (at - i)) * light)));
  return `rgb(${mix[0]},${mix[1]},${mix[2]})`;
}

// Pieces of the lines on which a grid has one value, by the corners of each triangle.
function contours(z, level) {
  const found = [];
  for (let i = 0; i + 1 < z.length; i++) for (let j = 0; j + 1 < z[0].length; j++) {
    for (const corners of [[[i, j], [i + 1, j], [i, j + 1]], [[i + 1, j + 1], [i + 1, j], [i, j + 1]]]) {
      if (!corners.every(([a, b]) => known(z[a][b]))) continue;
      const cut = [];
      for (const [p, q] of [[0, 1], [1, 2], [2, 0]]) {
        const [a, b] = [corners[p], corners[q]], va = z[a[0]][a[1]] - level, vb = z[b[0]][b[1]] - level;
        if (va < 0 !== vb < 0) { const t = va / (va - vb); cut.push([a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])]); }
      }
      if (cut.length === 2) found.push(cut);
    }
  }
  return found;
}

function surfaceView(section, plane, page) {
  const card = make(section, "div", { class: "card", "data-plane": plane.name }), head = make(card, "h3");
  make(head, "span", {}, `${plane.name} plane`);
  const value = make(head, "span", { class: "value" });
  const facts = make(card, "p"), row = make(card, "div", { class: "row" });
  const label = make(row, "label", {}, "colours and height: ");
  const scales = make(label, "select", { "aria-label": "scale" });
  make(scales, "option", { value: "own" }, "this picture's own range");
  make(scales, "option", { value: "run" }, "one range for the run");
  const reset = make(row, "button", { type: "button" }, "reset view");
  make(row, "span", { class: "quiet" }, "drag to turn, wheel to come nearer, arrow keys turn too");
  const canvas = make(card, "canvas", { tabindex: 0, role: "img", "aria-label": `surface of the loss, ${plane.name} plane` });
  const HOME = { yaw: 0.65, pitch: 0.52, zoom: 1 }, look = { ...HOME };
  const ctx = canvas.getContext("2d"), HEIGHT = 0.62;
  let scene = null, spots = [], pointed = null;

  const load = (step) => {
    const now = entryAt(plane.frames, step, (e) => e.step) || plane.frames[0], range = now[scales.value];
    const cols = now.y.length, z = now.x.map((_, i) => now.z.slice(i * cols, (i + 1) * cols));
    const span = (v, all) => (v - all[0]) / (all[all.length - 1] - all[0] || 1) - 0.5;
    scene = { now, range, z, xs: now.x.map((v) => span(v, now.x)), ys: now.y.map((v) => span(v, now.y)), span,
      share: (v) => Math.min(Math.max((v - range.low) / (range.high - range.low || 1), 0), 1), lines: null };
    scene.lines = [...Array(11).keys()].map((k) => range.low + ((k + 1) * (range.high - range.low)) / 12).map((v) => [v, contours(z, v)]);
    facts.textContent = now.facts;
    value.textContent = `step ${now.step} · loss ${shown(now.loss)}`;
  };
  const between = (all, at) => { const i = Math.min(Math.floor(at), all.length - 2); return all[i] + (at - i) * (all[i + 1] - all[i]); };

  const draw = () => {
    const width = Math.max(240, card.clientWidth - 34), height = Math.round(Math.min(560, Math.max(300, 0.56 * width))), ratio = window.devicePixelRatio || 1;
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) { canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = `${height}px`; }
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0); ctx.clearRect(0, 0, width, height);
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
    const [cy, sy, cp, sp] = [Math.cos(look.yaw), Math.sin(look.yaw), Math.cos(look.pitch), Math.sin(look.pitch)], size = 0.74 * Math.min(width * 0.66, height) * look.zoom;
    const project = (x, y, h) => {
      const u = cy * x - sy * y, away = sy * x + cy * y, up = h - HEIGHT / 2;
      const depth = cp * away - sp * up, k = size / (1 + 0.28 * depth);
      return [width / 2 + k * u, height * 0.44 - k * (cp * up + sp * away), depth];
    };
    const { now, range, z, xs, ys, share } = scene, tall = (v) => HEIGHT * share(v);
    const stroke = (points, how, wide) => { ctx.beginPath(); points.forEach((p, i) => ctx[i ? "lineTo" : "moveTo"](p[0], p[1])); ctx.strokeStyle = how; ctx.lineWidth = wide; ctx.stroke(); };
    const text = (words, at, how, align = "center") => { ctx.fillStyle = how; ctx.textAlign = align; ctx.font = "11.5px system-ui, sans-serif"; ctx.fillText(words, at[0], at[1]); };
    // Floor and the two walls behind, with lines at the ticks of the height.
    const back = [sy > 0 ? 0.5 : -0.5, cy > 0 ? 0.5 : -0.5], rule = colour("--rule"), quiet = colour("--quiet");
    stroke([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]].map(([a, b]) => project(a, b, 0)), rule, 1.2);
    for (const [v] of range.ticks) stroke([project(back[0], -back[1], tall(v)), project(back[0], back[1], tall(v)), project(-back[0], back[1], tall(v))], rule, 1);
    stroke([project(back[0], back[1], 0), project(back[0], back[1], HEIGHT)], rule, 1.2);
    // Lines of equal loss on the floor.
    ctx.globalAlpha = 0.85;
    for (const [v, pieces] of scene.lines) for (const piece of pieces) stroke(piece.map(([a, b]) => project(between(xs, a), between(ys, b), 0)), viridis(share(v)), 1.1);
    ctx.globalAlpha = 1;
    // Cells of the surface, far ones first; those with a value that is not finite are left open.
    const at = z.map((line, i) => line.map((v, j) => (known(v) ? project(xs[i], ys[j], tall(v)) : null))), cells = [];
    for (let i = 0; i + 1 < xs.length; i++) for (let j = 0; j + 1 < ys.length; j++) {
      const corners = [at[i][j], at[i + 1][j], at[i + 1][j + 1], at[i][j + 1]];
      if (corners.some((c) => c === null)) continue;
      const mean = (z[i][j] + z[i + 1][j] + z[i + 1][j + 1] + z[i][j + 1]) / 4;
      const dx = (tall(z[i + 1][j]) - tall(z[i][j])) / (xs[i + 1] - xs[i]), dy = (tall(z[i][j + 1]) - tall(z[i][j])) / (ys[j + 1] - ys[j]);
      const light = 0.74 + 0.36 * Math.max(0, (0.35 * dx - 0.5 * dy + 0.8) / Math.hypot(dx, dy, 1));
      cells.push([corners.reduce((s, c) => s + c[2], 0), corners, viridis(share(mean), light)]);
    }
    cells.sort((a, b) => b[0] - a[0]);
    ctx.lineJoin = "round";
    for (const [, corners, fill] of cells) {
      ctx.beginPath(); corners.forEach((c, k) => ctx[k ? "lineTo" : "moveTo"](c[0], c[1])); ctx.closePath();
      ctx.fillStyle = ctx.strokeStyle = fill; ctx.lineWidth = 1; ctx.fill(); ctx.stroke();
    }
    // The path of training, and the present weights.
    const place = (x, y, v) => project(scene.span(x, now.x), scene.span(y, now.y), known(v) ? tall(v) : 0);
    if (now.path.length) { const route = now.path.map(([x, y, v]) => place(x, y, v)); stroke(route, colour("--card"), 4.5); stroke(route, colour("--down"), 2.2); }
    const here = place(0, 0, now.centre);
    ctx.beginPath(); ctx.arc(here[0], here[1], 5, 0, 2 * Math.PI); ctx.fillStyle = colour("--down"); ctx.fill(); ctx.lineWidth = 2; ctx.strokeStyle = colour("--card"); ctx.stroke();
    // Names of both directions along the near edges, values of the height beside the far wall.
    const aside = (p) => (p[0] < width / 2 - 4 ? "right" : p[0] > width / 2 + 4 ? "left" : "center");
    for (const [words, a, b] of [[now.axes[0], 0, -1.14 * back[1]], [now.axes[1], -1.14 * back[0], 0]]) { const p = project(a, b, 0); text(words, p, quiet, aside(p)); }
    for (const end of [-0.46, 0.46]) {
      const p = project(end, -1.12 * back[1], 0), q = project(-1.12 * back[0], end, 0);
      text(shown(end < 0 ? now.x[0] : now.x[now.x.length - 1], 3), p, quiet, aside(p));
      text(shown(end < 0 ? now.y[0] : now.y[now.y.length - 1], 3), q, quiet, aside(q));
    }
    const ends = [project(back[0], -back[1], 0), project(-back[0], back[1], 0)], leftmost = ends[0][0] < ends[1][0];
    for (const [v, words] of range.ticks) { const p = leftmost ? project(back[0], -back[1], tall(v)) : project(-back[0], back[1], tall(v)); text(words, [p[0] - 8, p[1] + 4], quiet, "right"); }
    text(now.log ? "loss (log scale)" : "loss", [12, 18], colour("--ink"), "left");
    spots = at;
    if (pointed) {
      const [i, j] = pointed, p = at[i] && at[i][j];
      if (p) {
        const loss = now.log ? 10 ** z[i][j] : z[i][j];
        ctx.beginPath(); ctx.arc(p[0], p[1], 3.5, 0, 2 * Math.PI); ctx.fillStyle = colour("--ink"); ctx.fill();
        text(`loss ${shown(loss)} at ${shown(now.x[i], 3)}, ${shown(now.y[j], 3)}`, [width - 12, 18], colour("--ink"), "right");
      }
    }
  };
  let waiting = false;
  const soon = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
  const turn = (dx, dy) => { look.yaw += dx; look.pitch = Math.min(1.5, Math.max(0.08, look.pitch + dy)); soon(); };
  let held = null;
  canvas.addEventListener("pointerdown", (e) => { held = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointerleave", () => { pointed = null; soon(); });
  canvas.addEventListener("pointermove", (e) => {
    if (held) { turn((e.clientX - held[0]) * -0.008, (e.clientY - held[1]) * 0.008); held = [e.clientX, e.clientY]; return; }
    const box = canvas.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
    let best = 300; pointed = null;
    spots.forEach((line, i) => line.forEach((p, j) => { if (p) { const d = (p[0] - x) ** 2 + (p[1] - y) ** 2 + 40 * p[2]; if (d < best && (p[0] - x) ** 2 + (p[1] - y) ** 2 < 160) { best = d; pointed = [i, j]; } } }));
    soon();
  });
  canvas.addEventListener("wheel", (e) => { e.preventDefault(); look.zoom = Math.min(4, Math.max(0.5, look.zoom * Math.exp(-0.001 * e.deltaY))); soon(); }, { passive: false });
  canvas.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.08], ArrowDown: [0, -0.08] }[e.key];
    if (by) { e.preventDefault(); turn(...by); }
  });
  reset.addEventListener("click", () => { Object.assign(look, HOME); soon(); });
  scales.addEventListener("change", () => { load(page.step); soon(); });
  page.views.push({ draw: () => { load(page.step); draw(); }, show: (step) => { load(step); draw(); } });
}
