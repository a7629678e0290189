"""The look of ``report.html``: light, dark and on paper, with nothing from elsewhere."""

from __future__ import annotations

from bge_pruning.utils.visualization import DARK, LIGHT, Theme


def _colours(theme: Theme) -> str:
    """The page has the colours of its pictures."""
    names = {"surface": theme.surface, "ink": theme.ink, "muted": theme.muted, "line": theme.grid}
    names |= {"accent": theme.series[0], "alarm": theme.series[1]}
    return " ".join(f"--{name}: {colour};" for name, colour in names.items())


STYLE = f"""\
:root {{ color-scheme: light dark; {_colours(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_colours(DARK)} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; scroll-padding-top: 3.5rem; }}
body {{
  margin: 0; background: var(--surface); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}}
main {{ max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 5rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 0.75rem; overflow-wrap: anywhere; }}
h2 {{
  font-size: 1.35rem; margin: 3rem 0 1rem; padding-top: 0.9rem; border-top: 1px solid var(--line);
}}
h3 {{ font-size: 1.05rem; margin: 2rem 0 0.75rem; }}
p {{ max-width: 46rem; overflow-wrap: anywhere; }}
a {{ color: var(--accent); }}
:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 2px; }}

nav {{
  position: sticky; top: 0; z-index: 1; margin: 1.5rem -1.25rem 0; padding: 0.5rem 1.25rem;
  overflow-x: auto; background: var(--surface); border-bottom: 1px solid var(--line);
}}
nav ul {{
  display: flex; gap: 1.15rem; margin: 0; padding: 0; list-style: none; white-space: nowrap;
}}
nav a {{ color: var(--muted); text-decoration: none; font-size: 0.9rem; }}
nav a:hover {{ color: var(--accent); text-decoration: underline; }}

.scroll, figure, pre {{ overflow-x: auto; }}
.scroll {{ margin: 1.25rem 0; }}
table {{
  border-collapse: collapse; font-size: 0.9rem; line-height: 1.35;
  font-variant-numeric: tabular-nums;
}}
th, td {{
  padding: 0.42rem 0.9rem 0.42rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; text-align: left; vertical-align: bottom;
}}
th {{ color: var(--muted); font-weight: 600; }}
.scroll th {{ white-space: normal; min-width: 4.6rem; }}
.scroll td:first-child {{
  min-width: 6.8rem; max-width: 22rem; overflow-wrap: anywhere; white-space: normal;
}}
.scroll tbody tr:hover {{ background: color-mix(in srgb, var(--line) 45%, transparent); }}

.tiles thead {{ display: none; }}
.tiles table, .tiles tbody {{ display: block; }}
.tiles tbody {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(7.8rem, 1fr)); gap: 0.75rem;
  margin: 1.5rem 0;
}}
.tiles tr {{
  display: flex; flex-direction: column; justify-content: space-between; gap: 0.2rem;
  padding: 0.7rem 0.9rem; border: 1px solid var(--line); border-radius: 0.5rem;
}}
.tiles td {{ border: 0; padding: 0; white-space: normal; text-align: left !important; }}
.tiles td:first-child {{ color: var(--muted); font-size: 0.82rem; }}
.tiles td:last-child {{ font-size: 1.3rem; font-weight: 650; }}

figure {{ margin: 1.5rem 0; }}
figure img {{
  display: block; max-width: 100%; min-width: min(44rem, var(--width)); height: auto;
}}

pre {{
  margin: 1rem 0; padding: 0.9rem 1rem; font-size: 0.82rem; line-height: 1.5;
  background: color-mix(in srgb, var(--line) 40%, transparent); border-radius: 0.5rem;
}}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
summary {{ cursor: pointer; color: var(--accent); }}
blockquote {{
  max-width: 46rem; margin: 1.25rem 0; padding: 0.1rem 1rem; border-left: 4px solid var(--alarm);
  background: color-mix(in srgb, var(--alarm) 10%, transparent);
}}

@media print {{
  main {{ max-width: none; padding: 0; }}
  nav {{ display: none; }}
  h2, h3 {{ break-after: avoid; }}
  figure, tr, blockquote {{ break-inside: avoid; }}
  figure img {{ min-width: 0; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 0.65rem; }}
  th, td {{ padding-right: 0.6rem; white-space: normal; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
  details::details-content {{ content-visibility: visible; height: auto; }}
}}
"""
