"""The looks of the HTML page."""

STYLE = """
:root{--ink:#1c2430;--dim:#66707f;--line:#e2e6ec;--paper:#f6f7f9;--card:#fff;--bar:#3b6fb6;
--warn:#b4552d;--track:#eef1f5}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#97a1b0;--line:#2c3440;--paper:#12161c;
--card:#1a2028;--bar:#6b9fe0;--warn:#e08a5f;--track:#242c37}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",
"PingFang SC","Hiragino Sans GB","Microsoft YaHei","WenQuanYi Micro Hei",sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:22px;margin:0 0 16px;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
h3{font-size:13px;margin:20px 0 8px;color:var(--dim);font-weight:600}
h3.kind{font-size:15px;color:var(--ink);text-transform:capitalize;margin-bottom:0}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:18px 20px;
margin-top:18px}
section>h3:first-of-type{margin-top:8px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
display:flex;flex-direction:column}
.card b{font-size:24px;line-height:1.3;font-variant-numeric:tabular-nums}
.card span,.note,.none{color:var(--dim);font-size:12.5px}
.note,.none{margin:4px 0 8px}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 36px}
.two>div>h3:first-child{margin-top:4px}
@media(max-width:800px){.two{grid-template-columns:minmax(0,1fr)}}
.bars{display:grid;grid-template-columns:fit-content(45%) minmax(40px,1fr) auto;gap:3px 10px;
align-items:center;font-size:12.5px}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.track{background:var(--track);border-radius:2px;height:12px}
.track i{display:block;height:100%;min-width:1px;background:var(--bar);border-radius:2px}
.count,.number{text-align:right;font-variant-numeric:tabular-nums}
.many{max-height:480px;overflow:auto;padding-right:8px}
.wide{overflow-x:auto}.wide svg{min-width:560px}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--ink)}svg text.dim{fill:var(--dim)}svg text.warn{fill:var(--warn)}
.bar,.heat{fill:var(--bar)}.grid,.frame{stroke:var(--line)}
.curve{fill:none;stroke:var(--bar);stroke-width:2}
.limit{stroke:var(--warn);stroke-dasharray:4 4}
.chips{display:flex;flex-wrap:wrap;gap:5px;max-height:260px;overflow:auto}
.chips span{background:var(--track);border-radius:10px;padding:1px 9px;font-size:12.5px;
overflow-wrap:anywhere}
.chips em{font-style:normal;color:var(--dim);margin-left:6px}
table{border-collapse:collapse;font-size:12.5px;width:100%}
th{text-align:left;color:var(--dim);font-weight:600}
th.number{text-align:right}
td,th{padding:3px 12px 3px 0;border-bottom:1px solid var(--line);overflow-wrap:break-word;
vertical-align:top}
th,.number{white-space:nowrap}
.table{overflow-x:auto}
details,.row{margin:5px 0}summary{cursor:pointer}.row{padding-left:17px;color:var(--dim)}
details>*:not(summary){margin:6px 0 10px 16px}
.group td:first-child,.group th:first-child{min-width:16ch;width:24%}
.group{border-left:3px solid var(--warn);padding-left:10px;margin-bottom:12px}
ul{margin:0;padding-left:18px;font-size:12.5px}
"""
