// The page of `boxcar view`. Everything that comes from data is set as text (textContent, setAttribute of numbers), never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const PAGE = 100;
  const RATINGS = ["right", "loose", "wrong", "none"];
  const RATING_NAMES = { right: "right", loose: "loose", wrong: "wrong thing", none: "should be none" };
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const primary = data.arms[0];
  const items = data.items;
  items.forEach((item, place) => { item.place = place; item.key = JSON.stringify([item.sample_id, item.turn]); });

  // ---- small makers

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value; else if (key in made && key !== "list") made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  function shape(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }
  const percent = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
  const reply = (item, arm = primary) => (arm === undefined ? undefined : item.replies[arm]);
  const verdict = (item) => { const said = reply(item); return !said || said.right === null ? "–" : said.right ? "right" : "wrong"; };

  // ---- what is kept in the browser

  const STORE = `boxcar-view:${data.id}`;
  let kept = { rater: "", ratings: {} };
  try {
    const found = JSON.parse(localStorage.getItem(STORE) || "null");
    if (found && typeof found.ratings === "object") kept = found;
    localStorage.setItem(STORE, JSON.stringify(kept));
  } catch (error) {
    $("storage-warning").hidden = false;
  }
  function keep() {
    try { localStorage.setItem(STORE, JSON.stringify(kept)); } catch (error) { $("storage-warning").hidden = false; }
  }
  const mine = () => (kept.ratings[`@${kept.rater}`] ??= {});
  const ratingOf = (item) => (kept.rater ? mine()[item.key] : undefined);

  // ---- filters and order

  const FILTERS = [
    ["task", (item) => [item.task]],
    ["source", (item) => [item.source]],
    ["language", (item) => [item.language]],
    ["size", (item) => (item.sizes.length ? item.sizes : ["–"])],
    ...(primary ? [["read", (item) => [reply(item) ? reply(item).status : "–"]], ["verdict", (item) => [verdict(item)]]] : []),
    ["rating", (item) => { const rating = ratingOf(item); return rating ? ["rated", RATING_NAMES[rating]] : ["not rated"]; }],
  ];
  const chosen = {};
  const missingLast = (value) => (value === null || value === undefined ? Infinity : value);
  const iou = (item, arm = primary) => { const said = reply(item, arm); return said ? said.iou : null; };
  const gain = (item) => { const a = iou(item), b = iou(item, data.arms[1]); return a === null || b === null ? null : a - b; };
  const negative = (of) => (item) => { const value = of(item); return value === null || value === undefined ? null : -value; };
  const SORTS = [
    ["as in the data", (item) => item.place],
    ["shuffled", (item) => scatter(item.place)],
    ...(primary ? [["IoU, lowest first", iou], ["IoU, highest first", negative(iou)]] : []),
    ...(data.arms.length > 1 ? [["gain over " + data.arms[1] + ", most first", negative(gain)], ["loss against " + data.arms[1] + ", most first", gain]] : []),
    ["difficulty, hardest first", (item) => -item.difficulty],
    ["difficulty, easiest first", (item) => item.difficulty],
    ["tokens, most first", (item) => -(item.tokens + (reply(item) ? reply(item).tokens : 0))],
    ["boxes, most first", (item) => -item.truth.length],
  ];
  function scatter(place) { // a fixed shuffle: the same for every rater
    let hash = (place + 1) * 2654435761 >>> 0;
    hash = Math.imul(hash ^ (hash >>> 15), 2246822519) >>> 0;
    return (hash ^ (hash >>> 13)) >>> 0;
  }
  const haystack = (item) => (item.hay ??= [item.question, item.answer, item.sample_id, ...item.truth.map((box) => box.label),
    ...Object.values(item.replies).map((said) => said.text)].join("\n").toLowerCase());

  let visible = [];
  let at = 0;

  // Chosen with the mouse, a list must not keep the arrow keys, which are to move between questions.
  function letGo(select) {
    let byMouse = false;
    select.addEventListener("pointerdown", () => { byMouse = true; });
    select.addEventListener("keydown", () => { byMouse = false; });
    select.addEventListener("change", () => { if (byMouse) select.blur(); });
  }

  function fillFilters() {
    for (const [name, of] of FILTERS) {
      const counts = new Map();
      for (const item of items) for (const value of of(item)) counts.set(value, (counts.get(value) || 0) + 1);
      if (name === "rating") for (const value of ["rated", "not rated", ...Object.values(RATING_NAMES)]) counts.set(value, "");
      if (counts.size < 2 && name !== "rating") continue;
      const select = element("select", { id: `filter-${name}` });
      select.append(element("option", { value: "", textContent: "all" }));
      const values = name === "rating" ? [...counts.keys()] : [...counts.keys()].sort();
      for (const value of values) select.append(element("option", { value, textContent: counts.get(value) === "" ? value : `${value} (${counts.get(value)})` }));
      select.addEventListener("change", () => { chosen[name] = select.value; refresh(); });
      letGo(select);
      const tells = name === "verdict" || name === "read" ? "tells" : "";
      $("filters").append(element("label", { class: tells }, `${name} `, select));
    }
    SORTS.forEach(([name], place) => $("sort").append(element("option", { value: place, textContent: name })));
  }

  function refresh(keepKey) {
    const wanted = $("find").value.trim().toLowerCase();
    visible = items.filter((item) => (!wanted || haystack(item).includes(wanted))
      && FILTERS.every(([name, of]) => !chosen[name] || of(item).includes(chosen[name])));
    const of = SORTS[Number($("sort").value)][1];
    const keys = new Map(visible.map((item) => [item, missingLast(of(item))]));
    visible.sort((a, b) => (keys.get(a) === keys.get(b) ? a.place - b.place : keys.get(a) < keys.get(b) ? -1 : 1));
    at = Math.max(0, keepKey === undefined ? 0 : visible.findIndex((item) => item.key === keepKey));
    $("count").textContent = `${visible.length} of ${items.length}`;
    show();
  }

  // ---- drawing

  const shownBoxes = { truth: true, labels: true };
  data.arms.forEach((arm, number) => { shownBoxes[`arm-${number}`] = number < 1; });

  function fillToggles() {
    const rows = [["truth", primary ? "truth" : "boxes of the text", "truth"], ...data.arms.map((arm, number) => [`arm-${number}`, arm, `arm-${number}`]), ["labels", "labels", null]];
    for (const [name, title, colour] of rows) {
      const box = element("input", { type: "checkbox", id: `show-${name}`, checked: shownBoxes[name] });
      box.addEventListener("change", () => { shownBoxes[name] = box.checked; show(); });
      const swatch = colour ? element("span", { class: `swatch ${colour}${/arm-[1-9]/.test(colour) ? " dashed" : ""}` }) : null;
      if (swatch) swatch.style.borderTopColor = "currentColor";
      $("toggles").append(element("label", { class: name === "truth" && primary ? "tells" : "" }, box, swatch, title));
    }
  }

  function draw(svg, item, small) {
    svg.replaceChildren();
    svg.classList.toggle("small", small);
    const picture = item.picture;
    if (!picture) { svg.setAttribute("viewBox", "0 0 100 60"); return; }
    svg.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    svg.setAttribute("preserveAspectRatio", "xMidYMid meet");
    if (picture.file) svg.append(shape("image", { href: picture.file, x: 0, y: 0, width: picture.width, height: picture.height, preserveAspectRatio: "none" }));
    const layers = [];
    data.arms.map((arm, number) => [arm, number]).reverse().forEach(([arm, number]) => {
      const said = item.replies[arm];
      if (said && shownBoxes[`arm-${number}`]) layers.push([`arm-${number}`, said.boxes, false]);
    });
    if (shownBoxes.truth) layers.unshift(["truth", item.truth, Boolean(primary)]);
    const tags = []; // over all boxes
    for (const [name, boxes, tells] of layers) {
      for (const one of boxes) {
        const kind = `${name}${tells ? " tells" : ""}`;
        const group = shape("g", { class: kind });
        const [x0, y0, x1, y1] = one.box;
        const place = { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) };
        group.append(shape("rect", { ...place, class: "halo" }), shape("rect", { ...place, class: "box" }));
        svg.append(group);
        if (!small && shownBoxes.labels && one.label) {
          const above = shape("g", { class: kind });
          above.append(...tag(svg, picture, one, name));
          tags.push(above);
        }
      }
    }
    svg.append(...tags);
  }

  function tag(svg, picture, one, name) {
    const unit = Math.max(picture.width / Math.max(200, svg.clientWidth || 720), picture.height / Math.max(150, svg.clientHeight || 480));
    const text = one.label.length > 28 ? `${one.label.slice(0, 27)}…` : one.label;
    let length = 0;
    for (const letter of text) length += letter.codePointAt(0) > 0x2e80 ? 12.5 : 7.6;
    const height = 16 * unit, width = (length + 8) * unit;
    const x = Math.max(0, Math.min(one.box[0], picture.width - width));
    // Truth above its box, predictions below: tags of boxes that agree do not hide each other.
    const wanted = name === "truth" ? one.box[1] - height : one.box[3];
    const y = Math.max(0, Math.min(wanted, picture.height - height));
    const label = shape("text", { x: x + 4 * unit, y: y + 12 * unit, "font-size": 12 * unit, class: "tag-text" });
    label.textContent = text;
    return [shape("rect", { x, y, width, height, rx: 3 * unit, class: "tag" }), label];
  }

  // ---- the list and one item

  function badge(text, kind = "", tells = false) { return element("span", { class: `badge ${kind}${tells ? " tells" : ""}`, textContent: text }); }

  function showList() {
    const first = Math.floor(at / PAGE) * PAGE;
    const entries = visible.slice(first, first + PAGE).map((item, offset) => {
      const svg = shape("svg", { "aria-hidden": "true" });
      draw(svg, item, true);
      const under = element("span", { class: "under" }, element("span", { textContent: item.task }));
      const said = reply(item);
      if (said) {
        const text = said.iou !== null ? `IoU ${percent(said.iou)}` : said.right === null ? said.status : said.right ? "right" : "wrong";
        const span = element("span", { class: "tells", textContent: text });
        if (said.right !== null) span.style.color = said.right ? "var(--good)" : "var(--bad)";
        under.append(span);
      }
      const rating = ratingOf(item);
      if (rating) under.append(element("span", { textContent: `★ ${RATING_NAMES[rating]}` }));
      const entry = element("li", { tabIndex: -1 }, svg, element("div", { class: "entry" }, element("span", { class: "asked", textContent: item.asked.join(", ") || item.question }), under));
      entry.setAttribute("aria-current", String(first + offset === at));
      entry.addEventListener("click", () => move(first + offset));
      return entry;
    });
    if (!entries.length) entries.push(element("li", { class: "empty", textContent: "Nothing matches these filters." }));
    $("list").replaceChildren(...entries);
    const pages = Math.max(1, Math.ceil(visible.length / PAGE));
    $("page").textContent = `${Math.floor(at / PAGE) + 1} / ${pages}`;
    $("previous-page").disabled = first === 0;
    $("next-page").disabled = first + PAGE >= visible.length;
    const current = $("list").querySelector('[aria-current="true"]');
    if (current) current.scrollIntoView({ block: "nearest" });
  }

  function fact(name, value, tells = false) {
    return element("div", { class: tells ? "tells" : "" }, element("dt", { textContent: name }), element("dd", { textContent: value }));
  }

  function table(boxes, predicted) {
    const head = ["#", "label", "x0", "y0", "x1", "y1", ...(predicted ? ["IoU", "score"] : [])];
    const rows = boxes.map((one, number) => element("tr", {},
      element("td", { textContent: number + 1 }), element("td", { textContent: one.label || "–" }),
      ...one.box.map((value) => element("td", { class: "number", textContent: value.toFixed(1) })),
      ...(predicted ? [element("td", { class: "number tells", textContent: percent(one.iou) }), element("td", { class: "number", textContent: percent(one.score) })] : [])));
    const titles = head.map((title) => element("th", { scope: "col", class: `${title.length < 3 || predicted ? (title === "label" || title === "#" ? "" : "number") : ""}${title === "IoU" ? " tells" : ""}`, textContent: title }));
    return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...rows)));
  }

  function replyPanel(item, arm, number) {
    const said = item.replies[arm];
    const swatch = element("span", { class: `swatch arm-${number}${number ? " dashed" : ""}` });
    swatch.style.borderTopColor = "currentColor";
    const head = element("h2", {}, swatch, arm);
    if (!said) return element("div", { class: "panel" }, head, element("p", { textContent: "not asked" }));
    head.append(badge(said.status.replace("_", " "), said.status === "failed" ? "bad" : ""));
    if (said.right !== null) head.append(badge(said.right ? "right" : "wrong", said.right ? "good" : "bad", true));
    if (said.iou !== null) head.append(badge(`IoU ${percent(said.iou)}`, "", true));
    if (!said.complete) head.append(badge("cut at max_new_tokens", "bad"));
    head.append(badge(`${said.tokens} tokens`));
    const panel = element("div", { class: "panel" }, head);
    if (said.question !== item.question) panel.append(element("p", { textContent: `Asked: ${said.question}` }));
    panel.append(element("pre", { textContent: said.text === "" ? "(empty reply)" : said.text }));
    if (said.repairs.length) panel.append(element("p", { textContent: `Repairs: ${said.repairs.join(", ")}` }));
    panel.append(said.boxes.length ? table(said.boxes, true) : element("p", { textContent: said.status === "none_found" ? "Read as: nothing is there." : "No box could be read." }));
    return panel;
  }

  function show() {
    showList();
    const item = visible[at];
    $("detail").style.visibility = item ? "visible" : "hidden";
    if (!item) return;
    draw($("picture"), item, false);
    const picture = item.picture;
    $("caption").textContent = picture === null ? "No image." : `${picture.where} — ${picture.original[0]}×${picture.original[1]} px, seen as ${picture.width}×${picture.height} px${picture.problem ? `. Not read: ${picture.problem}` : ""}`;
    $("facts").replaceChildren(fact("question", `${at + 1} of ${visible.length}`), fact("sample", `${item.sample_id}, turn ${item.turn}`), fact("task", item.task), fact("source", item.source),
      fact("language", item.language), fact("size", item.sizes.join(", ") || "–"), fact("difficulty", item.difficulty.toFixed(2)),
      fact(primary ? "prompt tokens" : "tokens", String(item.tokens)), ...(gain(item) === null ? [] : [fact(`IoU gain over ${data.arms[1]}`, (gain(item) >= 0 ? "+" : "") + gain(item).toFixed(2), true)]));
    const truth = element("div", { class: `panel${primary ? " tells" : ""}` }, element("h2", {}, primary ? "Answer of the data" : "Answer"), element("pre", { textContent: item.answer }));
    if (item.truth.length) truth.append(table(item.truth, false));
    $("texts").replaceChildren(element("div", { class: "panel" }, element("h2", { textContent: "Question" }), element("pre", { textContent: item.question })),
      ...data.arms.map((arm, number) => replyPanel(item, arm, number)), truth);
    showRating(item);
  }

  function move(place) {
    if (!visible.length) return;
    at = Math.max(0, Math.min(visible.length - 1, place));
    show();
  }

  // ---- rating

  function fillKeys() {
    RATINGS.forEach((rating, number) => {
      const button = element("button", { type: "button", id: `rate-${rating}` }, element("kbd", { textContent: number + 1 }), ` ${RATING_NAMES[rating]}`);
      button.addEventListener("click", () => rate(rating));
      $("keys").append(button);
    });
  }

  function showRating(item) {
    const rating = ratingOf(item);
    for (const name of RATINGS) $(`rate-${name}`).setAttribute("aria-pressed", String(name === rating));
    const count = kept.rater ? Object.keys(mine()).length : 0;
    $("progress").textContent = `${count} rated`;
    $("export-json").disabled = $("export-csv").disabled = count === 0;
  }

  function rate(rating) {
    const item = visible[at];
    if (!item) return;
    if (!kept.rater) { $("rater").focus(); $("rater").placeholder = "your name first"; return; }
    if (rating === null) delete mine()[item.key]; else mine()[item.key] = rating;
    keep();
    if (rating !== null && at + 1 < visible.length) move(at + 1); else show();
  }

  function exported() {
    const given = mine();
    return items.filter((item) => given[item.key]).map((item) => {
      const said = reply(item);
      return { sample_id: item.sample_id, turn: item.turn, rating: given[item.key], task: item.task, iou: said ? said.iou : null, right: said ? said.right : null };
    });
  }

  function download(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = element("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  const fileName = (ending) => `ratings-${kept.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}-${data.id.slice(0, 8)}.${ending}`;
  const about = () => ({ format: "boxcar-ratings", version: 1, page: data.id, subject: primary || "shards", rater: kept.rater, shown: items.length, of: data.num_items });
  function exportJson() { download(fileName("json"), "application/json", `${JSON.stringify({ ...about(), ratings: exported() }, null, 1)}\n`); }
  function exportCsv() {
    const fixed = about();
    const columns = [...Object.keys(fixed), "sample_id", "turn", "rating", "task", "iou", "right"];
    // A cell that begins like a formula gets a quote before it: spreadsheets would run it.
    const cell = (value) => { const text = value === null || value === undefined ? "" : String(value); const safe = typeof value === "string" && /^[=+\-@\t\r']/.test(text) ? `'${text}` : text; return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe; };
    const lines = exported().map((one) => { const row = { ...fixed, ...one }; return columns.map((name) => cell(row[name])).join(","); });
    download(fileName("csv"), "text/csv", `${[columns.join(","), ...lines].join("\r\n")}\r\n`);
  }

  // ---- wiring

  fillFilters();
  fillToggles();
  fillKeys();
  $("rater").value = kept.rater;
  $("rater").addEventListener("input", () => { kept.rater = $("rater").value.trim(); keep(); show(); });
  $("rater").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === "Escape") $("rater").blur(); });
  $("blind").addEventListener("change", () => { document.body.classList.toggle("blind", $("blind").checked); $("blind").blur(); });
  $("find").addEventListener("input", () => refresh());
  $("sort").addEventListener("change", () => refresh());
  letGo($("sort"));
  $("reset").addEventListener("click", () => {
    for (const select of document.querySelectorAll("#filters select")) select.value = "";
    for (const name of Object.keys(chosen)) delete chosen[name];
    $("find").value = "";
    $("sort").value = "0";
    refresh(visible[at] && visible[at].key);
  });
  $("previous-page").addEventListener("click", () => move((Math.floor(at / PAGE) - 1) * PAGE));
  $("next-page").addEventListener("click", () => move((Math.floor(at / PAGE) + 1) * PAGE));
  $("export-json").addEventListener("click", exportJson);
  $("export-csv").addEventListener("click", exportCsv);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox") return;
    if (event.key === "ArrowRight" || event.key === "ArrowDown") move(at + 1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowUp") move(at - 1);
    else if (event.key >= "1" && event.key <= "4") rate(RATINGS[Number(event.key) - 1]);
    else if (event.key === "0") rate(null);
    else return;
    event.preventDefault();
  });
  const bar = document.querySelector(".toolbar");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
  refresh();
})();
