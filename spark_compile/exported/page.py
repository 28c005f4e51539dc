"""The frame of the page that ``picture`` fills: its style, in light and dark, and its headings."""

from __future__ import annotations

from string import Template

_KINDS = {
    "input": "from outside the layer",
    "product": "matrix product",
    "attention": "attention",
    "cache": "cache",
    "spark": "spark operator",
    "other": "elementwise and the rest",
}

LEGEND = (
    '<ul class="legend">'
    + "".join(f'<li><i class="{kind}"></i>{meaning}</li>' for kind, meaning in _KINDS.items())
    + '</ul><p class="hint">Views and arithmetic of positions are part of the arrows; weights are '
    "left out. A box at an arrow with two heads is changed in place. S is a size that changes from "
    "call to call. A box tells more when the pointer rests on it.</p>"
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --page: #f6f7f9; --card: #ffffff; --text: #1b2430; --soft: #5d6b7c; --rule: #dde2e9;
  --line: #9aa7b6; --good: #14804a; --bad: #c0362c;
  --input: #f0f2f5; --input-edge: #b6c0cc; --product: #dbe9fd; --product-edge: #5b93e0;
  --attention: #ece0fd; --attention-edge: #9566dd; --cache: #fdecc8; --cache-edge: #d99a1c;
  --spark: #0f9d76; --spark-edge: #0b7a5c; --spark-text: #ffffff;
  --other: #ffffff; --other-edge: #cdd5de;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11161d; --card: #19212b; --text: #e6ebf1; --soft: #98a6b6; --rule: #2b3643;
    --line: #66778a; --good: #4cc38a; --bad: #ff8379;
    --input: #222c38; --input-edge: #4b5a6b; --product: #1c3556; --product-edge: #5b93e0;
    --attention: #36265a; --attention-edge: #a57fe6; --cache: #46360f; --cache-edge: #d99a1c;
    --spark: #12805f; --spark-edge: #3fd0a4; --spark-text: #ffffff;
    --other: #19212b; --other-edge: #3a4756;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1700px; padding: 28px clamp(14px, 3vw, 40px) 60px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
code, svg text {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
h1 {
  font-size: clamp(22px, 4vw, 32px); line-height: 1.2; margin: 0 0 18px; overflow-wrap: anywhere;
}
h2 { font-size: 20px; margin: 40px 0 10px; overflow-wrap: anywhere; }
h2 code { font-size: .9em; font-weight: 600; }
h3 { font-size: 16px; margin: 22px 0 8px; }
.top {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 16px;
}
.facts, .bars, .graph, .sites {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.facts {
  width: 100%; border-collapse: separate; border-spacing: 0; padding: 6px 16px; font-size: 14px;
}
.facts th {
  text-align: left; font-weight: 500; color: var(--soft); vertical-align: top;
  padding: 5px 18px 5px 0; white-space: nowrap;
}
.facts td { padding: 5px 0; overflow-wrap: anywhere; width: 100%; }
.facts tr + tr > * { border-top: 1px solid var(--rule); }
.bars {
  margin: 0; padding: 16px; display: grid; grid-template-columns: auto 1fr auto; gap: 8px 12px;
  align-items: center; align-content: center; font-size: 14px;
}
.bars .name { color: var(--soft); }
.bars .number { font-variant-numeric: tabular-nums; text-align: right; }
.bar { height: 18px; border-radius: 5px; background: var(--input); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 5px; background: var(--line); }
.bar.after i { background: var(--spark); }
.bars figcaption { grid-column: 1 / -1; color: var(--soft); }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0; padding: 0;
  font-size: 13px; color: var(--soft);
}
.legend i {
  display: inline-block; width: 14px; height: 14px; border-radius: 4px;
  border: 1.3px solid var(--edge); background: var(--fill); margin-right: 7px;
  vertical-align: -2px;
}
.hint { margin: 6px 0 0; font-size: 13px; color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr; gap: 16px; }
@media (min-width: 1100px) { .pair { grid-template-columns: 1fr 1fr; } }
.graph { margin: 0; padding: 12px; min-width: 0; }
.graph figcaption {
  font-size: 12px; font-weight: 600; letter-spacing: .06em; text-transform: uppercase;
  color: var(--soft); margin: 0 4px 8px;
}
.scroll { overflow-x: auto; }
svg { display: block; margin: 0 auto; max-width: 100%; height: auto; min-width: min(100%, 500px); }
@media (max-width: 700px) { svg { max-width: none; min-width: 520px; } }
svg text { text-anchor: middle; fill: var(--text); }
svg .title { font-size: 12.5px; font-weight: 600; }
svg .detail { font-size: 10px; fill: var(--soft); }
svg rect { stroke-width: 1.3; }
.input { --fill: var(--input); --edge: var(--input-edge); }
.product { --fill: var(--product); --edge: var(--product-edge); }
.attention { --fill: var(--attention); --edge: var(--attention-edge); }
.cache { --fill: var(--cache); --edge: var(--cache-edge); }
.spark { --fill: var(--spark); --edge: var(--spark-edge); }
.other { --fill: var(--other); --edge: var(--other-edge); }
.box rect { fill: var(--fill); stroke: var(--edge); }
svg .spark text { fill: var(--spark-text); }
svg .spark rect { stroke-width: 2.4; }
.arrow .line { fill: none; stroke: var(--line); stroke-width: 1.3; }
.arrow .head { fill: var(--line); stroke: none; }
.arrow.cache .line { stroke: var(--cache-edge); }
.arrow.cache .head { fill: var(--cache-edge); }
.none { color: var(--soft); }
.sites { overflow-x: auto; padding: 4px 16px; }
.sites table { border-collapse: collapse; width: 100%; font-size: 13px; }
.sites th { text-align: left; color: var(--soft); font-weight: 500; }
.sites th, .sites td { padding: 6px 14px 6px 0; vertical-align: top; }
.sites tbody td { border-top: 1px solid var(--rule); }
.sites td:nth-child(n+3):nth-child(-n+6) {
  white-space: nowrap; font-variant-numeric: tabular-nums;
}
.sites td:last-child { min-width: 180px; }
.rewritten td:last-child { color: var(--good); }
.refused td:last-child { color: var(--bad); }
</style>
</head>
<body>
<h1>$title</h1>
<div class="top">$facts$bars</div>
$layer
$legend
$phases
<h2>Attention sites</h2>
<div class="sites"><table>
<thead><tr><th>phase</th><th>layer</th><th>heads</th><th>Dk/Dv</th><th>bytes/token</th><th>spark</th>
<th>keys / values</th><th>result</th></tr></thead>
<tbody>$sites</tbody>
</table></div>
</body>
</html>
""")
