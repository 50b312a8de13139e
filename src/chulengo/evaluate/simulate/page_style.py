"""The style of the transcripts page."""

STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#22201d;--soft:#6b665f;--line:#e2ddd5;--client:#efece6;--agent:#dcebe3;
--good:#1d6b45;--bad:#a33a2a;--real:#f7f5f1}
@media (prefers-color-scheme:dark){:root{--paper:#191816;--card:#211f1d;--ink:#ece8e1;--soft:#a39c92;--line:#3a3733;
--client:#2d2a27;--agent:#1f3a2e;--good:#79c9a0;--bad:#ee8d7c;--real:#26302b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.7rem;margin:0 0 .75rem;line-height:1.2}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:.5rem 0;font-size:.92rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.facts ul{margin:0;padding:0;list-style:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:.4rem .75rem .4rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:500}
tbody th{font-weight:600;white-space:nowrap}
.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.definition{color:var(--soft);font-size:.82rem;min-width:18rem}
code{font-size:.9em}
nav{display:flex;flex-wrap:wrap;gap:.3rem}
nav a{padding:.1rem .5rem;border:1px solid var(--line);border-radius:.4rem;text-decoration:none;font-size:.82rem;
color:var(--soft);background:var(--card)}
.good{color:var(--good)!important}
.bad{color:var(--bad)!important}
.conversation{background:var(--card);border:1px solid var(--line);border-radius:.6rem;margin:1rem 0;padding:.8rem 1rem}
summary{cursor:pointer}
summary small{color:var(--soft);margin-left:.5rem}
.pill{border:1px solid currentColor;border-radius:1rem;padding:0 .55rem;font-size:.8rem;white-space:nowrap}
.talk{list-style:none;margin:.8rem 0 0;padding:0;display:flex;flex-direction:column;gap:.5rem}
.talk li{max-width:82%;padding:.45rem .8rem .5rem;border-radius:.7rem}
.talk p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.client{align-self:flex-start;background:var(--client);border-bottom-left-radius:.15rem!important}
.agent{align-self:flex-end;background:var(--agent);border-bottom-right-radius:.15rem!important}
.who{display:block;color:var(--soft);font-size:.75rem}
.real{margin-top:.4rem!important;padding:.35rem .6rem;border-radius:.4rem;background:var(--real);font-size:.88rem;
color:var(--soft)}
.empty{color:var(--soft);font-style:italic}
@media (max-width:36rem){.talk li{max-width:95%}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.4rem}
tr{display:grid;grid-template-columns:1fr 4rem 8.2rem 2rem;border-bottom:1px solid var(--line);padding:.4rem 0}
tbody th{white-space:normal}th,td{border:0;padding:0}.definition{grid-column:1/-1;min-width:0}
thead th:last-child{display:none}}
@media print{:root{--paper:#fff}body{max-width:none;padding:0}nav{display:none}.talk li,summary{break-inside:avoid}
::details-content{display:block;content-visibility:visible}
.client,.agent,.real{border:1px solid var(--line)}}
"""
