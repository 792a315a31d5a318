"""Looks of the report: one style sheet, light and dark by the reader's setting, readable on paper too."""

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1b1f27;--soft:#5d6675;--line:#e4e6ea;
--s1:#2563b8;--s2:#b45309;--s3:#0f766e;--s4:#7e4bb5;--s5:#a8326e;--s6:#5b6b1f;
--good:#0f7b3f;--bad:#b3362b;--tint:#f2f4f7}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--card:#1b1f26;--ink:#e8eaee;--soft:#a0a8b5;
--line:#2e343e;--s1:#7ab0f2;--s2:#eba556;--s3:#55c2b4;--s4:#bf9cec;--s5:#f08fbe;--s6:#b9c96a;
--good:#5fc98c;--bad:#ee8a80;--tint:#232830}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em}
h2.run{font-size:23px;border-top:1px solid var(--line);padding-top:28px}
h3{font-size:15px;margin:24px 0 6px}
p{margin:4px 0 12px;max-width:74ch}
.soft,figcaption,caption{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;margin:20px 0 8px}
.tile,.card,figure{background:var(--card);border:1px solid var(--line);border-radius:8px}
.tile{padding:14px 16px}
.tile b{display:block;margin:2px 0;font-size:30px;line-height:1.15;font-weight:600;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:13px}
.tile .name{color:var(--ink);font-size:14px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px;
margin:12px 0}
figure{margin:0;padding:12px 14px 8px}
figcaption{font-size:13px;display:flex;justify-content:space-between;gap:12px;flex-wrap:wrap;margin-bottom:4px}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--line);stroke-width:1}
.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}.line.s3{stroke:var(--s3)}.line.s4{stroke:var(--s4)}
.line.s5{stroke:var(--s5)}.line.s6{stroke:var(--s6)}
.dot{stroke:var(--card);stroke-width:1.5}
.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}.dot.s4{fill:var(--s4)}
.dot.s5{fill:var(--s5)}.dot.s6{fill:var(--s6)}
.point{fill:var(--s1);opacity:.4}
.reference{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:3 3}
.keys{display:inline-flex;gap:2px 12px;flex-wrap:wrap}
.key::before{content:"";display:inline-block;width:14px;height:0;margin-right:5px;vertical-align:middle;
border-top:3px solid var(--soft)}
.key.s1::before{border-color:var(--s1)}.key.s2::before{border-color:var(--s2)}
.key.s3::before{border-color:var(--s3)}.key.s4::before{border-color:var(--s4)}
.key.s5::before{border-color:var(--s5)}.key.s6::before{border-color:var(--s6)}
.key.dashed::before{border-top-style:dashed;border-top-width:2px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:10px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 14px 4px;font-size:13px}
th,td{padding:8px 14px;text-align:right;border-top:1px solid var(--line);vertical-align:top;
white-space:nowrap}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
th:first-child,td:first-child,.left{text-align:left}
tbody th{font-weight:500}
td small,th small{display:block;color:var(--soft);font-size:12px;font-weight:400}
.interval{width:180px;height:22px}
.scale{stroke:var(--line);stroke-width:2}
.whisker{stroke:var(--s1);stroke-width:3;stroke-linecap:round;opacity:.55}
tr.best th,tr.best td{background:var(--tint)}
.tag{display:inline-block;font-size:12px;color:var(--soft);border:1px solid var(--line);border-radius:99px;
padding:0 8px;margin-left:6px}
.good{color:var(--good)}.bad{color:var(--bad)}
.missing{border-left:3px solid var(--line);padding:2px 0 2px 12px;color:var(--soft)}
.examples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:10px;
margin:10px 0}
.example{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;display:flex;
gap:14px}
.example img{width:72px;height:72px;border-radius:6px;background:#fff;flex:none}
.example ol{margin:0;padding:0;list-style:none;min-width:0}
.example li{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;font-size:14px;line-height:1.45}
.example .asked{color:var(--soft);font-size:12.5px}
.strip{display:block}
.strip .pictures{display:grid;grid-template-columns:repeat(5,1fr);gap:8px;margin-top:8px;max-width:340px}
.strip figure{padding:0;border:0;background:none;text-align:center;font-size:12px;color:var(--good)}
.strip img{width:100%;height:auto;aspect-ratio:1;outline:2px solid var(--line);outline-offset:1px}
.strip .hit img{outline-color:var(--good)}
.share{display:block;margin:-8px -14px;padding:8px 14px}
.share.right{background:rgb(15 123 63 / var(--a))}.share.wrong{background:rgb(179 54 43 / var(--a))}
.share small{color:inherit;opacity:.75}
.wraps{white-space:normal}
.weight{display:inline-block;margin-right:18px}.weight small{display:inline;margin-left:4px}
.errors{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:12px;
margin:12px 0}
.error{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;display:flex;
gap:14px;flex-wrap:wrap}
.views{display:flex;gap:8px;flex:none}
.view{position:relative;width:112px;height:112px;border-radius:6px;overflow:hidden;background:#fff}
.view img{width:100%;height:100%;display:block}
.view .heat{position:absolute;inset:0}
.what{flex:1 1 150px;min-width:0;font-size:14px}
.what p{margin:0 0 4px;overflow-wrap:anywhere}
.what .said b{color:var(--bad)}.what .said span{color:var(--soft);font-size:13px}
.what .soft{font-size:12.5px}
.words{line-height:1.7}
.word{background:rgb(235 120 0 / var(--a));border-radius:3px;padding:1px 2px}
details{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:8px 14px}
summary{cursor:pointer}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--tint);border-radius:4px;
padding:1px 5px}
footer{margin-top:48px;color:var(--soft);font-size:13px}
@media (max-width:600px){main{padding:20px 14px 48px}th,td{padding:7px 9px}
.share{margin:-7px -9px;padding:7px 9px}
.tile b{font-size:25px}}
@media print{body{background:#fff}details{display:block}.scroll{overflow:visible}}
"""
