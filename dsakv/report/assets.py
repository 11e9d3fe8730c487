"""Style sheet and script of the HTML report."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5d6770; --line: #dbe0e5; --paper: #fff; --mark: #0b6bcb;
  --alarm: #b45309; --loud: #b91c1c; --soft: #f4f6f8; --card: #fbfcfd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa5ae; --line: #363d44; --paper: #15181b;
  --mark: #6cb2f7; --alarm: #f0a94b; --loud: #f87171; --soft: #1e2327; --card: #1a1e22; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; color: var(--ink); background: var(--paper);
  margin: 1.5rem auto 4rem; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
nav { margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; } a { color: var(--mark); }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dl.facts dt { color: var(--dim); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.lead, .note { color: var(--dim); margin: .2rem 0; }
.warning { border-left: 4px solid var(--alarm); background: var(--soft); padding: .4rem .8rem; margin: .5rem 0; }
.loud { border: 2px solid var(--loud); color: var(--loud); font-weight: 700; font-size: 1.05rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--mark); border-radius: 6px;
  padding: .8rem 1rem; break-inside: avoid; min-width: 0; overflow-wrap: anywhere; }
.card h3 { margin: 0 0 .4rem; } .card dt { color: var(--dim); margin-top: .5rem; }
.card dd { margin: 0; } .card dd.basis { color: var(--dim); font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: .8rem 0; }
.tile { background: var(--soft); border-radius: 6px; padding: .4rem .7rem; } .tile b { display: block;
  font-size: 1.2rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--dim); font-size: .82rem; }
.wide { overflow-x: auto; }
.pair { display: flex; flex-wrap: wrap; gap: 0 3rem; } .pair > div { min-width: 0; max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0 .3rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; } th { color: var(--dim); font-weight: 500; vertical-align: bottom; }
.words { text-align: left; } td.prose { white-space: normal; min-width: 18rem; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.2rem 0 0; min-width: 0; break-inside: avoid; } figcaption b { display: block; }
figcaption { font-size: .9rem; color: var(--dim); } figcaption b { color: var(--ink); font-size: 1rem; }
.charts { display: none; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 0 1.5rem; }
.charts.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
.scripted .charts { display: grid; } .scripted .unscripted { display: none; }
.charts .full { grid-column: 1 / -1; } .plot { width: 100%; }
details { margin: .8rem 0; } .basis details { margin: 0; } summary { cursor: pointer; color: var(--mark); }
@media print { :root { --ink: #000; --dim: #444; --line: #ccc; --paper: #fff; --soft: #f4f6f8; --card: #fff;
  --mark: #0b6bcb; --alarm: #b45309; --loud: #b91c1c; color-scheme: light; }
  html, body { font-size: 11px; } body { max-width: none; margin: 0; } nav { display: none; }
  table { break-inside: avoid; }
  .wide { overflow: visible; } th, td { padding: .1rem .35rem; } .charts { grid-template-columns: 1fr !important; } }
"""

# Charts are drawn as they come into view, all of them before a print. Colors of text and grid follow the page's.
SCRIPT = """
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();
  const theme = night => {
    const [ink, line] = night ? ["#e6e9ec", "#363d44"] : ["#1c2024", "#dbe0e5"];
    const axis = {gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line};
    return {layout: {font: {color: ink, family: 'system-ui, "Liberation Sans", sans-serif', size: 12},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      hoverlabel: {bgcolor: night ? "#1e2327" : "#ffffff", bordercolor: line, font: {color: ink}, align: "left"}}};
  };
  const draw = (box, night) => {
    if (drawn.has(box)) return;
    drawn.add(box);
    const chart = charts[Number(box.dataset.chart)];
    const stacked = box.clientWidth < 600 ? 17 * Math.max(0, chart.data.length - 3) : 0;  // the legend's lines
    Plotly.newPlot(box, chart.data, {...chart.layout, height: chart.layout.height + stacked, template: theme(night)},
      {responsive: true, displayModeBar: false});
  };
  const paint = (night, width) => drawn.forEach(box =>
    Plotly.relayout(box, {template: theme(night), width: width, autosize: width === null}));
  document.documentElement.classList.add("scripted");
  const boxes = [...document.querySelectorAll(".plot")];
  for (const box of boxes) box.style.minHeight = charts[Number(box.dataset.chart)].layout.height + "px";
  const watch = new IntersectionObserver(seen => {
    for (const {target} of seen.filter(entry => entry.isIntersecting)) {
      watch.unobserve(target);
      draw(target, dark.matches);
    }
  }, {rootMargin: "800px"});
  boxes.forEach(box => watch.observe(box));
  dark.addEventListener("change", () => paint(dark.matches, null));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach(part => { part.open = true; });
    boxes.forEach(box => draw(box, false));
    paint(false, 700);  // a page of paper, in CSS pixels
  });
  addEventListener("afterprint", () => paint(dark.matches, null));
})();
"""
