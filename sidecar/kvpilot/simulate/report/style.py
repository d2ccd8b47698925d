"""How the report looks: the dashboards' colours, which people with the common colour-vision deficiencies tell
apart (Okabe and Ito), on light and on dark.
"""

_LIGHT = (
    "--pilot:#0072B2;--best:#C27C00;--defaults:#59616b;--single:#B0578D;--good:#00795A;--bad:#C44F00;"
    "--page:#f4f5f7;--card:#fff;--ink:#1a1f26;--soft:#56606b;--line:#e2e5e9;--well:#eef0f3;--band:#E69F0022"
)
_DARK = (
    "--pilot:#56B4E9;--best:#E69F00;--defaults:#aeb8c2;--single:#CC79A7;--good:#2BC597;--bad:#F0803C;"
    "--page:#0f1216;--card:#171b21;--ink:#e6e9ec;--soft:#9aa5b1;--line:#272d35;--well:#1f252c;--band:#E69F0026"
)
_THEMES = f":root{{color-scheme:light dark;{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
_MARKS = """
svg text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
svg .title{font-size:13px;font-weight:600;fill:var(--ink)}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}
svg .name{fill:var(--ink);font-size:12px}svg .value{fill:var(--ink);font-size:12px;font-weight:600}
svg .note{font-size:10.5px;fill:var(--soft)}
svg .page{fill:var(--card)}
svg .grid,svg .rail{stroke:var(--line);fill:none}svg .base,svg .notch{stroke:var(--soft);opacity:.6;fill:none}
svg .rule{stroke:var(--ink);stroke-dasharray:2 3;fill:none;opacity:.75}
svg .band{fill:var(--band)}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke:var(--soft)}
svg .line.pilot{stroke:var(--pilot);stroke-width:2.2}
svg .line.best{stroke:var(--best);stroke-dasharray:6 3}
svg .line.defaults{stroke:var(--defaults);stroke-dasharray:2 2;stroke-width:1.9}
svg .line.single{stroke:var(--single);stroke-dasharray:7 2.5 1.5 2.5}
svg .line.home{stroke:var(--soft);stroke-dasharray:3 3;stroke-width:1}
svg .spread{stroke-width:2.5;opacity:.55;stroke-linecap:round}svg .spread.pilot{stroke:var(--pilot)}
svg .spread.best{stroke:var(--best)}svg .spread.defaults{stroke:var(--defaults)}
svg .spread.single{stroke:var(--single)}
svg .fill{stroke:none}svg .fill.pilot{fill:var(--pilot);opacity:.2}svg .fill.shed{fill:var(--bad);opacity:.75}
svg .dot{stroke:var(--card);stroke-width:1.2;fill:var(--soft)}
svg .dot.pilot{fill:var(--pilot)}svg .dot.best{fill:var(--best)}svg .dot.defaults{fill:var(--defaults)}
svg .dot.single{fill:var(--single)}svg .dot.point{fill:var(--soft);opacity:.65}
svg .dot.low{fill:var(--bad)}svg .dot.fine{fill:var(--pilot)}
"""
CHARTS = _THEMES + _MARKS
"""Of a chart alone."""

PAGE = (
    CHARTS
    + """
*{box-sizing:border-box;margin:0}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1216px;margin:0 auto;padding:1.6rem clamp(.8rem,2.5vw,2rem) 3rem;display:grid;gap:1rem}
main>*{min-width:0}
h1{font-size:clamp(1.35rem,3.4vw,1.8rem);line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.05rem;letter-spacing:-.005em}h3{font-size:.86rem;font-weight:600;margin-bottom:.25rem}
.sub,.note{color:var(--soft)}.sub{margin-top:.3rem}.note{font-size:.84rem;max-width:78ch;margin-top:.15rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.15rem 1.15rem}
.verdict{font-size:1.06rem;margin-top:.7rem;max-width:76ch}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:.8rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.8rem .9rem .8rem;
overflow:hidden;position:relative}
.tile::before{content:"";position:absolute;inset:0 0 auto;height:3px;background:var(--line)}
.tile.good::before{background:var(--good)}.tile.bad::before{background:var(--bad)}.tile.pilot::before{background:var(--pilot)}
.tile b{display:block;font-size:1.6rem;font-weight:640;line-height:1.25;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.8rem;line-height:1.35;display:block}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.pair>*{min-width:0}
h2+.pair{margin-top:.6rem}
.knobs{display:grid;grid-template-columns:1fr 1fr;gap:.9rem 1.4rem;margin-top:.8rem}
figure svg{display:block;width:100%;height:auto}.narrow{display:none}
.over>figure{margin-top:.9rem}
.scroll{overflow-x:auto;margin-top:.55rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.26rem .35rem .26rem .6rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft)}td:first-child,th:first-child{text-align:left;padding-left:.35rem}
thead th{font-size:.8rem}tbody tr:last-child>*{border-bottom:0}tr.strong td{font-weight:640}
tbody tr:hover{background:var(--well)}
td.text,th.text{text-align:left;white-space:normal;overflow-wrap:break-word;min-width:7rem}
th i{display:inline-block;width:.62rem;height:.62rem;border-radius:50%;margin-right:.35rem;
background:var(--soft)}
th i.pilot{background:var(--pilot)}th i.best{background:var(--best)}th i.single{background:var(--single)}
th i.defaults{background:var(--defaults)}
.holds,.missed,.unknown{font-weight:640}.holds{color:var(--good)}.missed{color:var(--bad)}.unknown{color:var(--soft)}
pre{background:var(--well);border-radius:8px;padding:.7rem .9rem;font-size:.84rem;white-space:pre-wrap;
overflow-wrap:anywhere;margin-top:.5rem;font-family:ui-monospace,SFMono-Regular,Menlo,monospace}
details{margin-top:.7rem}summary{cursor:pointer;color:var(--soft);font-size:.88rem}
dl{font-size:.86rem;margin-top:.5rem}dt{font-weight:600;margin-top:.45rem}dd{color:var(--soft);max-width:80ch}
@media(max-width:1000px){.tiles{grid-template-columns:repeat(3,1fr)}}
@media(max-width:700px){.pair,.knobs{grid-template-columns:1fr}.tiles{grid-template-columns:1fr 1fr}
table{font-size:.8rem}th,td{padding:.26rem .2rem}th{white-space:normal}thead th{font-size:.74rem}
td.text,th.text{min-width:5.2rem;overflow-wrap:anywhere}th i{display:block;margin:0 0 .15rem auto}
.wide{display:none}.narrow{display:block}.card{padding:.85rem .85rem 1rem}.tile b{font-size:1.35rem}}
@media print{.card,.tile{break-inside:avoid}}
"""
)
