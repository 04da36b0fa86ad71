// What the page shows, and the one step of training that all of it follows.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const steps = new Set();
  for (const h of data.hessians) { for (const f of h.spectra ? h.spectra.frames : []) steps.add(f.step); for (const f of h.layers) steps.add(f.step); }
  for (const s of data.slices) for (const p of [...s.planes, ...s.lines]) for (const f of p.frames) steps.add(f.step);
  if (!steps.size) for (const c of data.curves) for (const p of c.points) steps.add(p[0]);
  const all = [...steps].sort((a, b) => a - b);
  const range = extent([...data.curves, ...data.own].flatMap((c) => c.points.map((p) => p[0])).concat(all));
  const page = { views: [], range, step: all.length ? all[all.length - 1] : range[1], named: data.hessians.length > 1 };

  const section = (id, there) => { $(id).hidden = !there; return $(id); };
  const [first, more] = [data.curves.filter((c) => c.first), data.curves.filter((c) => !c.first)];
  const curves = section("curves", data.curves.length), grids = curves.querySelectorAll(".grid");
  for (const c of first) curveChart(grids[0], c, page);
  const basins = data.slices.flatMap((s) => s.basin.length > 1 ? [{ tag: `${s.name}/basin`, title: "Effective radius of the basin", note: "in filter norms; band: two standard errors", points: s.basin.map(([step, r, e]) => [step, r, known(r) ? r - 2 * (e || 0) : r, known(r) ? r + 2 * (e || 0) : r]) }] : []);
  for (const c of basins) curveChart(grids[0], c, page);
  const details = curves.querySelector("details");
  details.hidden = !more.length;
  details.querySelector("summary").textContent = `${more.length} criteria and norms`;
  for (const c of more) curveChart(grids[1], c, page);
  const spectra = data.hessians.filter((h) => h.spectra);
  for (const h of spectra) spectrumChart(section("spectra", true), h, page);
  for (const s of data.slices) for (const p of s.planes) surfaceView(section("surfaces", true), p, page);
  for (const s of data.slices) for (const l of s.lines) lineChart(section("lines", true).querySelector(".grid"), l, page);
  for (const h of data.hessians) if (h.layers.length) layerChart(section("layers", true), h, page);
  for (const c of data.own) curveChart(section("own", true).querySelector(".grid"), c, page);

  const tiles = first.filter((c) => ["lambda_max", "lambda_min", "trace", "stability", "loss"].includes(c.tag.split("/").pop())).slice(0, 5).map((c) => {
    const tile = make($("tiles"), "div", { class: "tile" });
    make(tile, "span", {}, c.title);
    return [c, make(tile, "b"), make(tile, "span")];
  });
  const tell = () => {
    $("at").textContent = `step ${page.step}`;
    for (const [c, big, small] of tiles) {
      const p = entryAt(c.points, page.step);
      big.textContent = p ? shown(p[1], 3) : "–";
      const half = p && known(p[2]) ? Math.max(p[1] - p[2], p[3] - p[1]) : 0;
      // An end of which only one side is sure is no number with a ±.
      small.textContent = !p ? "not yet" : p[4] ? `${p[4]} (95\u00a0%)` : half ? `± ${shown(half, 2)} (band)` : " ";
    }
  };
  const go = (step) => { page.step = step; $("step").value = String(Math.max(0, all.indexOf(step))); tell(); for (const v of page.views) v.show(step); };
  page.choose = (wanted) => go(all.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a), all[0]));

  $("steps").hidden = all.length < 2;
  $("step").max = String(all.length - 1);
  $("step").addEventListener("input", () => go(all[Number($("step").value)]));
  let playing = null;
  const stop = () => { clearInterval(playing); playing = null; $("play").textContent = "▶"; };
  $("play").addEventListener("click", () => {
    if (playing) { stop(); return; }
    $("play").textContent = "❚❚";
    if (page.step === all[all.length - 1]) go(all[0]);
    playing = setInterval(() => {
      const next = all[all.indexOf(page.step) + 1];
      if (next === undefined) stop(); else go(next);
    }, Math.max(120, Math.min(700, 9000 / all.length)));
  });
  const redraw = () => { for (const v of page.views) v.draw(); };
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  details.addEventListener("toggle", redraw);
  let width = 0;
  new ResizeObserver(() => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; redraw(); } }).observe(document.body);
  redraw();
  go(page.step);
  // A page whose script came to its end says so.
  document.documentElement.dataset.ready = "true";
})();
