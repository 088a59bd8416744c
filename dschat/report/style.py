"""The style sheet of a report: light and dark, wide and narrow, without any request."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1c1f24; --soft: #5b6470; --line: #d9dde3; --panel: #f6f7f9;
  --added: #fff0b8;
  --c0: #2563eb; --c1: #d9480f; --c2: #2f9e44; --c3: #9c36b5;
  --c4: #0b7285; --c5: #c2255c; --c6: #846d00; --c7: #5f6b7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --text: #e6e9ee; --soft: #9aa4b2; --line: #333a45; --panel: #1c2128;
    --added: #5a4a0c;
    --c0: #7aa7ff; --c1: #ff9a66; --c2: #69db7c; --c3: #da9bf0;
    --c4: #66d9e8; --c5: #ff8fb1; --c6: #e8cf5a; --c7: #a9b4c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; margin: .3rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.charts {
  display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
}
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: .5rem; min-width: 0; }
figcaption { font-weight: 600; font-size: .9rem; }
figcaption .soft { font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 10px; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.point { fill: currentColor; }
.bar { fill: currentColor; fill-opacity: .55; }
.keys { font-size: .8rem; }
.key { margin-right: .8rem; }
.swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: .2em;
  background: currentColor;
}
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); }
.s3 { color: var(--c3); } .s4 { color: var(--c4); } .s5 { color: var(--c5); }
.s6 { color: var(--c6); } .s7 { color: var(--c7); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
th { border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.prompt { margin: .8rem 0; padding: .7rem; background: var(--panel); border-radius: .5rem; }
.question { white-space: pre-wrap; font-weight: 600; }
.answers {
  display: grid; gap: .7rem; margin-top: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
}
.answer { border-left: 3px solid var(--line); padding-left: .6rem; white-space: pre-wrap; }
.name { display: block; font-size: .8rem; color: var(--soft); }
mark { background: var(--added); color: inherit; border-radius: .2em; }
@media print { details { break-inside: avoid; } }
"""
