// The page: what is asked is in the address, so a link holds the query. Words: key, the name of a picture; tile, its small image.

const FIELDS = ["q", "minus", "after", "before", "folder"]; // inputs that are in the address by their names
const POLL = 1000; // milliseconds

const at = (id) => document.getElementById(id);
let keys = []; // of the pictures in the grid, in their order
let page = 0; // the next one to load
let asked = 0; // counts searches, so that late answers to earlier ones are dropped
let loading = false;
let upload = null; // {key, url} of a picture from outside
let like = ""; // the key of a picture of the gallery that the others should be like
let wasLikely = true; // whether the last picture in the grid is likely
let shown = -1; // position in keys of the picture in the viewer
let lastCount = -1; // pictures that were there at the last look

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function ask(address, options) {
  const answer = await fetch(address, options).catch(() => null);
  if (!answer) throw new Error("the server does not answer; is python app.py still running?");
  const value = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw Object.assign(new Error(value.error), { status: answer.status });
  return value;
}

// ---- the query -------------------------------------------------------------------------------------------------------

function readAddress() {
  const query = new URLSearchParams(location.search);
  for (const name of FIELDS) at(name).value = query.get(name) || "";
  at("filters").open = FIELDS.slice(1).some((name) => query.get(name));
  setLike(query.get("like") || "");
  select("results");
}

function address(changes = {}) {
  const query = new URLSearchParams();
  for (const name of FIELDS) if (at(name).value.trim()) query.set(name, at(name).value.trim());
  if (like) query.set("like", like);
  for (const [name, value] of Object.entries(changes)) if (value) query.set(name, value);
  return query;
}

function pushAndSearch() {
  const query = address().toString();
  if (query !== location.search.slice(1)) history.pushState(null, "", query ? `?${query}` : location.pathname);
  search();
}

async function search() {
  clear();
  at("message").textContent = "";
  document.title = at("q").value ? `${at("q").value} · Picture search` : "Picture search";
  if (at("q").value.trim() || upload || like) await loadMore();
  else at("message").textContent = "Type what a picture shows, or drop a picture here.  /  goes to the search field.";
}

function clear() {
  asked += 1;
  [keys, page, loading, wasLikely] = [[], 0, false, true];
  at("grid").replaceChildren();
}

async function loadMore() {
  if (loading || page < 0) return;
  loading = true;
  const mine = asked;
  const query = address({ upload: upload && upload.key, page });
  try {
    const answer = await ask(`/api/search?${query}`);
    if (mine !== asked) return;
    showMatches(answer);
  } catch (error) {
    if (mine !== asked) return;
    at("message").textContent = error.message;
    page = -1;
  }
  loading = false;
  if (page > 0 && at("end").getBoundingClientRect().top < innerHeight + 400) loadMore();
}

function showMatches(answer) {
  const best = `best of ${answer.of.toLocaleString()} pictures`;
  if (page === 0) at("message").textContent = answer.nothing ? `Probably nothing here; the ${best}` : `B${best.slice(1)}`;
  for (const match of answer.matches) {
    if (!match.likely && wasLikely && !answer.nothing) at("grid").append(element("p", { className: "divider", textContent: "less likely" }));
    wasLikely = match.likely;
    at("grid").append(tile(match, keys.length));
    keys.push(match.key);
  }
  page = answer.more ? page + 1 : -1;
}

function tile(match, position) {
  const image = element("img", { src: `/picture/${match.key}`, alt: match.name, loading: "lazy" });
  image.onerror = () => (button.hidden = true); // deleted since it was found
  const label = element("span", {}, `${match.label}  ${match.name}`);
  const button = element("button", { className: "tile", type: "button", title: match.name }, image, label);
  if (position !== null) button.onclick = () => view(position);
  else
    button.onclick = () => {
      shown = -1; // not one of the search's pictures
      viewPicture(match.key);
    };
  return button;
}

// ---- a picture to search with ------------------------------------------------------------------------------------------

async function uploadPicture(file) {
  at("message").textContent = "looking at the picture …";
  select("results");
  try {
    const answer = await ask(`/api/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    removeGiven();
    upload = { key: answer.upload, url: URL.createObjectURL(file) };
    showGiven(upload.url, file.name, answer.captions);
    pushAndSearch();
  } catch (error) {
    at("message").textContent = error.message;
  }
}

const captionItems = (captions) =>
  captions.map(({ caption, score }) => element("li", {}, `${caption} `, element("small", { textContent: score })));

function showGiven(url, name, captions) {
  at("given-image").src = url;
  at("given-image").alt = at("given-name").textContent = name;
  at("given-captions").replaceChildren(...captionItems(captions));
  at("answers").replaceChildren();
  at("given").hidden = false;
}

async function setLike(key) {
  if (key === like) return;
  removeGiven();
  like = key;
  if (!key) return;
  try {
    const { path, captions } = await ask(`/api/picture/${key}`);
    if (like === key) showGiven(`/picture/${key}`, `like ${path.split(/[\\/]/).pop()}`, captions);
  } catch (error) {
    if (like === key) showGiven("data:,", "like a picture that is not there, or not yet", []); // with a button to remove it
  }
}

function removeGiven() {
  if (upload) URL.revokeObjectURL(upload.url);
  upload = null;
  like = "";
  at("given").hidden = true;
  at("file").value = "";
}

async function classify(event) {
  event.preventDefault();
  try {
    const query = new URLSearchParams({ names: at("names").value, ...(upload ? { upload: upload.key } : { like }) });
    const { classes } = await ask(`/api/classify?${query}`);
    at("answers").replaceChildren(
      ...classes.map(({ name, probability }) => {
        const item = element("li", { textContent: `${Math.min(100 * probability, 99.9).toFixed(1)}%  ${name}` });
        item.style.setProperty("--share", `${100 * probability}%`);
        return item;
      }),
    );
  } catch (error) {
    at("answers").replaceChildren(element("li", { textContent: error.message }));
  }
}

// ---- the viewer ------------------------------------------------------------------------------------------------------

function view(position) {
  if (position < 0 || position >= keys.length) return;
  shown = position;
  viewPicture(keys[position]);
  if (position > keys.length - 6) loadMore();
}

const step = (by) => shown >= 0 && view(shown + by);

async function viewPicture(key) {
  at("viewer").dataset.key = key;
  at("large").src = `/picture/${key}?large`;
  for (const id of ["path", "facts"]) at(id).textContent = "";
  at("captions").replaceChildren();
  at("explain").hidden = !at("q").value.trim();
  if (!at("viewer").open) at("viewer").showModal();
  try {
    const { path, date, captions } = await ask(`/api/picture/${key}`);
    if (at("viewer").dataset.key !== key) return;
    at("path").textContent = path;
    at("large").alt = path;
    at("facts").textContent = date || "";
    at("captions").replaceChildren(...captionItems(captions));
  } catch (error) {
    at("path").textContent = error.message;
  }
}

function searchLike() {
  const key = at("viewer").dataset.key;
  at("viewer").close();
  at("q").value = at("minus").value = "";
  select("results");
  setLike(key);
  pushAndSearch();
  scrollTo(0, 0);
}

function explain() {
  const key = at("viewer").dataset.key;
  const heat = `/heat/${key}?${new URLSearchParams({ q: at("q").value.trim() })}`;
  at("large").src = at("large").src.includes("/heat/") ? `/picture/${key}?large` : heat;
}

// ---- tabs ------------------------------------------------------------------------------------------------------------

const openers = { results: () => {}, map: openMap, duplicates: openDuplicates, run: openRun };

function select(name) {
  if (!(name in openers)) name = "results";
  for (const other of Object.keys(openers)) {
    at(other).hidden = other !== name;
    at(`tab-${other}`).setAttribute("aria-selected", other === name);
  }
  openers[name]();
}

const isOpen = (name) => !at(name).hidden;

async function openMap() {
  const answer = await fetch("/map").catch(() => null);
  const say = at("map").querySelector(".message");
  if (answer && answer.ok) {
    if (!at("map").querySelector("iframe")) at("map").append(element("iframe", { src: "/map", title: "Map of all pictures" }));
    say.hidden = true;
  } else if (answer && answer.status === 503) {
    say.textContent = "laying the pictures out …";
    if (isOpen("map")) setTimeout(() => isOpen("map") && openMap(), POLL);
  } else say.textContent = answer ? (await answer.json()).error : "the server does not answer";
}

async function openDuplicates() {
  const section = at("duplicates");
  const say = section.querySelector(".message");
  try {
    const { working, groups } = await ask("/api/duplicates");
    if (working) {
      say.textContent = "comparing the pictures …";
      setTimeout(() => isOpen("duplicates") && openDuplicates(), POLL);
      return;
    }
    say.textContent = groups.length
      ? `Photographs with copies: ${groups.length.toLocaleString()}. The best copy of each is first. Nothing is deleted.`
      : "No photograph is there twice.";
    section.replaceChildren(
      say,
      ...groups.map((group) =>
        element("div", { className: "group" }, element("div", { className: "grid" }, ...group.map((copy) => tile(copy, null)))),
      ),
    );
  } catch (error) {
    say.textContent = error.message;
  }
}

async function openRun() {
  try {
    const { run, files } = await ask("/api/status");
    const pictures = files.map((name) => element("img", { src: `/run/${name}`, alt: name }));
    at("run").replaceChildren(element("p", { textContent: `The model is ${run}.` }), ...pictures);
  } catch (error) {
    at("run").textContent = error.message;
  }
}

// ---- what is there ---------------------------------------------------------------------------------------------------

async function watch() {
  try {
    const { pictures, total, working, problem, notes } = await ask("/api/status");
    const count = `${pictures.toLocaleString()} pictures${working ? ` of ${total.toLocaleString()}` : ""}`;
    at("status").textContent = [count, problem, ...notes].filter(Boolean).join(" · ");
    at("progress").hidden = !working || !total;
    at("progress").value = total ? pictures / total : 0;
    const untouched = scrollY < 100 && !at("viewer").open && isOpen("results");
    if (lastCount >= 0 && pictures !== lastCount && untouched && (at("q").value === (new URLSearchParams(location.search).get("q") || ""))) search();
    lastCount = pictures;
  } catch (error) {
    at("status").textContent = error.message;
  }
  setTimeout(watch, POLL);
}

// ---- keys, drops, clicks ---------------------------------------------------------------------------------------------

function moveFocus(step) {
  const tiles = [...at("grid").querySelectorAll(".tile")];
  const columns = getComputedStyle(at("grid")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const here = tiles.indexOf(document.activeElement);
  const target = tiles[here < 0 ? 0 : here + steps[step]];
  if (target) target.focus();
  return Boolean(target);
}

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("viewer").open) {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "m") searchLike();
    if (event.key === "h" && !at("explain").hidden) explain();
    return;
  }
  if (event.key === "/" && !typing) {
    event.preventDefault();
    at("q").focus();
  }
  if (event.key.startsWith("Arrow") && (!typing || event.key === "ArrowDown") && moveFocus(event.key)) event.preventDefault();
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) uploadPicture(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => event.clipboardData.files.length && uploadPicture(event.clipboardData.files[0]));
addEventListener("popstate", () => {
  readAddress();
  search();
});

at("query").onsubmit = (event) => {
  event.preventDefault();
  select("results");
  pushAndSearch();
};
at("file").onchange = () => at("file").files.length && uploadPicture(at("file").files[0]);
at("given-remove").onclick = () => {
  removeGiven();
  pushAndSearch();
};
at("classes").onsubmit = classify;
at("close").onclick = () => at("viewer").close();
at("viewer").onclick = (event) => event.target === at("viewer") && at("viewer").close();
at("viewer").onclose = () => {
  const tiles = at("grid").querySelectorAll(".tile");
  const typing = document.activeElement.matches("input"); // the event comes late
  if (shown >= 0 && tiles[shown] && !typing) tiles[shown].focus();
};
at("previous").onclick = () => step(-1);
at("next").onclick = () => step(1);
at("like").onclick = searchLike;
at("explain").onclick = explain;
for (const name of Object.keys(openers)) at(`tab-${name}`).onclick = () => select(name);
new IntersectionObserver((entries) => entries[0].isIntersecting && page > 0 && loadMore(), { rootMargin: "600px" }).observe(at("end"));

readAddress();
search();
watch();
