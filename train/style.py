"""The style sheet of every page: the reader's own fonts, two colour schemes, print."""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #23211d; --soft: #6b665c; --line: #e4e0d6;
  --accent: #22578f; --good: #2c7a4b; --warn: #a86400; --bad: #b3372f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --card: #1e2024; --ink: #e6e3dc; --soft: #a09b90; --line: #33363c;
    --accent: #8db8ea; --good: #74c794; --warn: #e5ad55; --bad: #f08d84;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 66rem; padding: 0 clamp(1rem, 4vw, 2.5rem) 5rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 var(--sans); overflow-wrap: break-word;
}
/* The layers of a kue lapis, the project's mark. */
body::before {
  content: ""; position: absolute; inset: 0 0 auto; height: 6px;
  background: linear-gradient(#2f7d55 0 1.5px, #f2e3b8 0 3px, #d9797c 0 4.5px, #22578f 0);
}
header { padding: 3.5rem 0 .5rem; }
h1, h2 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); letter-spacing: -.01em; margin: 0; }
header p { color: var(--soft); font-size: 1.05rem; margin: .4rem 0 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: 1.2rem; font-size: .92rem; }
nav a { color: var(--accent); text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
h2 {
  font-size: 1.45rem; margin: 3rem 0 1rem; padding-top: 1.2rem; border-top: 1px solid var(--line);
}
p { max-width: 70ch; margin: .8rem 0; }
code { font-family: var(--mono); font-size: .88em; }
p code, figcaption code {
  display: inline-block; max-width: 100%; line-height: 1.35;
  background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .05em .3em;
}
.scroll { overflow-x: auto; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.note {
  --tone: var(--accent); max-width: none; margin: 1.4rem 0; padding: .9rem 1.2rem;
  background: color-mix(in srgb, var(--tone) 9%, var(--card));
  border-left: 4px solid var(--tone); border-radius: 0 8px 8px 0;
}
.note.good { --tone: var(--good); }
.note.warn { --tone: var(--warn); }
.note.bad { --tone: var(--bad); }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 100%), 1fr));
  gap: .9rem 1.4rem; margin: 1.2rem 0;
}
.facts dt { color: var(--soft); font-size: .82rem; line-height: 1.4; }
.facts dd {
  margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; unicode-bidi: isolate;
}
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.5; }
th, td { padding: .42rem 1.4rem .42rem 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); unicode-bidi: isolate; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; white-space: nowrap; }
td { max-width: 34rem; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.4rem 0; }
.plot .scroll, .photo .scroll {
  width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); padding: .4rem;
}
figure img { display: block; max-width: 100%; height: auto; }
figure.wide img { max-width: none; }
figcaption { max-width: 70ch; margin-top: .6rem; }
.gallery {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr));
  gap: 1.2rem; margin: 1.4rem 0;
}
.gallery figure { margin: 0; }
.gallery img { width: 100%; border-radius: 8px; }
.plot .scroll { background: #fff; }
@media (prefers-color-scheme: dark) {
  /* White paper becomes this grey and hues stay: plots need no second rendering. */
  .plot .scroll { background: #1f1f1f; }
  .plot img { filter: invert(.88) hue-rotate(180deg); }
}
pre {
  margin: 1rem 0; padding: .9rem 1.1rem; background: var(--card); user-select: all;
  border: 1px solid var(--line); border-radius: 8px; line-height: 1.5;
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --accent: #22578f; --good: #2c7a4b; --warn: #a86400; --bad: #b3372f;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  header { padding-top: 1.5rem; }
  nav { display: none; }
  h2 { break-after: avoid; }
  figure, .note, tr, pre { break-inside: avoid; }
  .scroll { overflow: visible; }
  figure img, figure.wide img { max-width: 100%; filter: none; }
  .plot .scroll { background: #fff; }
  pre { white-space: pre-wrap; }
}
"""
