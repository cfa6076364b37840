"use strict";
// One image at a time goes to the server, and what it makes of it is shown. All text enters the page as text.
(() => {
  const at = (id) => document.getElementById(id);
  const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)} %`;
  const count = (number) => number.toLocaleString("en");
  let about = null;
  let chosen = null; // {name, body} of a file, or {name, group, place} of one of the server's
  let asked = 0; // the latest request of each kind has the right to the page
  let askedMask = 0;
  let mask = 0;

  // ---- talking to the server -----------------------------------------------------------------------------------

  const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  async function answer(response) {
    let found = null;
    try {
      found = await response.json();
    } catch (error) { /* no answer of ours */ }
    if (response.ok && found !== null) return found;
    const words = found && found.error ? found.error : `the server answered ${response.status}`;
    throw Object.assign(new Error(words), { again: Number(response.headers.get("Retry-After")), status: response.status });
  }

  async function ask(path, options) {
    let response;
    try {
      response = await fetch(path, { cache: "no-store", redirect: "error", ...options });
    } catch (error) {
      throw new Error("the server does not answer; see whether it still runs");
    }
    return answer(response);
  }

  async function send(path, subject, values, isLatest) {
    const query = new URLSearchParams(values);
    if (!subject.body) {
      query.set("group", subject.group);
      query.set("place", subject.place);
    }
    const options = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: subject.body || "" };
    for (let attempt = 0; ; attempt += 1) {
      try {
        return await ask(`${path}?${query}`, options);
      } catch (error) {
        if (error.status !== 503 || !error.again || attempt === 2 || !isLatest()) throw error;
        say("The model is busy; waiting…");
        await sleep(error.again);
      }
    }
  }

  // ---- saying what happens -------------------------------------------------------------------------------------

  function say(text) { at("status").textContent = text; }

  function complain(error) {
    say("");
    const text = error.message || String(error);
    at("problem").textContent = text.charAt(0).toUpperCase() + text.slice(1) + ".";
    at("problem").hidden = false;
  }

  function busy(is) { at("result").setAttribute("aria-busy", String(is)); }

  // ---- pieces of the page --------------------------------------------------------------------------------------

  function make(tag, attributes = {}, children = []) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element[key] = value;
    element.append(...children);
    return element;
  }

  function picture(url, alt) {
    const image = make("img", { alt, src: url });
    image.addEventListener("load", () => image.classList.toggle("coarse", image.naturalWidth < 128));
    return image;
  }

  function put(id, url, alt) {
    const image = at(id);
    image.onload = () => image.classList.toggle("coarse", image.naturalWidth < 128);
    image.src = url;
    image.alt = alt;
  }

  // What an image is called: its class, else its file without the folder, which the title has.
  const named = (entry) => entry.truth || entry.name.split("/").pop();

  function pictureButton(group, entry, lines, label) {
    const image = picture(`api/picture/${group}/${entry.place}`, "");
    const button = make("button", { type: "button", title: entry.name }, [image, ...lines]);
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => look({ name: named(entry), group, place: entry.place }));
    return make("li", {}, [button]);
  }

  // ---- showing what was found ----------------------------------------------------------------------------------

  function showExamples() {
    at("example-list").replaceChildren(...about.examples.map((entry) => {
      const name = named(entry);
      return pictureButton("examples", entry, [make("span", { textContent: name })], `Look at ${name}`);
    }));
    at("examples").hidden = about.examples.length === 0;
  }

  function showSeen(found) {
    put("seen", found.seen, "The image as the model is shown it");
    const own = `${found.size} pixels; the model is given their centre at ${about.size}.`;
    at("seen-note").textContent = [own, ...found.notes.map((note) => `${note}.`)].join(" ");
  }

  function showClasses(prediction) {
    at("classes-part").hidden = prediction === null;
    if (prediction === null) return;
    at("classes-title").textContent = prediction.by === "head" ? "Class" : "Class, by a vote of the nearest";
    at("classes-how").textContent = prediction.how;
    at("classes").replaceChildren(...prediction.classes.map((entry) => {
      const bar = make("span");
      bar.style.width = `${100 * entry.score}%`;
      const track = make("div", { className: "track" }, [bar]);
      return make("li", {}, [
        make("span", { textContent: entry.class }), make("span", { textContent: percent(entry.score) }), track,
      ]);
    }));
  }

  function showNeighbours(neighbours) {
    const among = about.bank === about.of ? `all ${count(about.of)}` : `${count(about.bank)} of the ${count(about.of)}`;
    at("neighbours-how").textContent = `By cosine similarity of features, among ${among} training images of ` +
      `${about.data}. Choose one to look at it.`;
    at("neighbours").replaceChildren(...neighbours.map((entry) => {
      const similarity = entry.similarity.toFixed(3);
      const lines = [
        make("span", { className: "truth", textContent: named(entry) }),
        make("span", { className: "soft", textContent: entry.same ? `${similarity}, the same` : similarity }),
      ];
      const label = `${named(entry)}, similarity ${similarity}${entry.same ? ", the same image" : ""}`;
      return pictureButton("train", entry, lines, label);
    }));
  }

  function showMaps(maps) {
    at("maps").replaceChildren(...maps.map((map) => {
      const caption = make("figcaption", {}, [make("strong", { textContent: map.title }), ` ${map.note}`]);
      return make("figure", { className: "picture" }, [picture(map.picture, map.title), caption]);
    }));
  }

  function showRatio() {
    const ratio = Number(at("ratio").value);
    at("ratio-shown").textContent = percent(ratio) + (ratio === about.reconstruction.own ? ", as in training" : "");
  }

  function summary(found) {
    const parts = [`Done: ${chosen.name}.`];
    if (found.prediction) {
      const best = found.prediction.classes[0];
      parts.push(`${found.prediction.by === "head" ? "Class" : "Vote of the nearest"}: ${best.class}, ${percent(best.score)}.`);
    }
    const nearest = found.neighbours[0];
    if (nearest) parts.push(`Nearest: ${named(nearest)}, similarity ${nearest.similarity.toFixed(3)}.`);
    return parts.join(" ");
  }

  // ---- what a person does --------------------------------------------------------------------------------------

  async function look(subject) {
    if (about === null) return;
    const own = (asked += 1);
    const isLatest = () => own === asked;
    at("problem").hidden = true;
    say(`Looking at ${subject.name}…`);
    busy(true);
    try {
      if (subject.body && subject.body.size > about.max_bytes) {
        const allowed = (about.max_bytes / 2 ** 20).toLocaleString("en");
        throw new Error(`this file is larger than the ${allowed} MiB that are taken; make it smaller first`);
      }
      const found = await send("api/look", subject, {}, isLatest);
      if (!isLatest()) return;
      chosen = subject;
      showSeen(found);
      showClasses(found.prediction);
      showNeighbours(found.neighbours);
      at("result").hidden = false;
      say(summary(found));
      busy(false);
      if (about.reconstruction) {
        put("true", found.seen, "The image as the model is shown it");
        await reconstruct();
      }
      await maps(isLatest);
    } catch (error) {
      if (isLatest()) complain(error);
    } finally {
      if (isLatest()) busy(false);
    }
  }

  async function maps(isLatest) {
    at("maps-part").setAttribute("aria-busy", "true");
    try {
      const found = await send("api/maps", chosen, {}, isLatest);
      if (isLatest()) showMaps(found.maps);
    } finally {
      if (isLatest()) at("maps-part").setAttribute("aria-busy", "false");
    }
  }

  async function reconstruct() {
    const own = (askedMask += 1);
    const subject = chosen;
    const isLatest = () => own === askedMask && subject === chosen;
    const ratio = Number(at("ratio").value);
    try {
      const found = await send("api/reconstruct", subject, { ratio, mask }, isLatest);
      if (!isLatest()) return;
      const hidden = `${found.hidden} of ${found.of} patches`;
      put("masked", found.seen, `The image with ${hidden} hidden`);
      put("made", found.made, "The image with the hidden patches filled in by the model");
      const flat = found.given_patch_mean ? "each hidden patch's own mean" : "the mean colour of what is seen";
      const told = found.given_patch_mean
        ? " This model predicts patches without their mean and contrast, which are put back from the image: they are given, not predicted."
        : "";
      at("masked-note").textContent = `${hidden} hidden. Mean squared error there ${found.error.toFixed(4)}, of values in ` +
        `0 to 1; with ${flat} in their place it would be ${found.flat_error.toFixed(4)}.${told}`;
      at("masked-part").hidden = false;
    } catch (error) {
      if (isLatest()) complain(error);
    }
  }

  function takeFile(files) {
    if (!files || files.length === 0) {
      complain(new Error("that was no file; drop, paste or choose an image file"));
      return;
    }
    look({ name: files[0].name || "the pasted image", body: files[0] });
  }

  function listen() {
    at("file").addEventListener("change", (event) => {
      if (event.target.files.length) takeFile(event.target.files);
      event.target.value = ""; // the same file may be chosen again
    });
    const drop = at("drop");
    let within = 0; // entering a child comes before leaving its parent
    document.addEventListener("dragenter", (event) => { event.preventDefault(); within += 1; drop.classList.add("over"); });
    document.addEventListener("dragleave", () => { within -= 1; drop.classList.toggle("over", within > 0); });
    document.addEventListener("dragover", (event) => event.preventDefault()); // else a browser opens what is dropped
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      within = 0;
      drop.classList.remove("over");
      takeFile(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) takeFile(event.clipboardData.files);
    });
    const ratio = at("ratio");
    ratio.addEventListener("input", showRatio);
    ratio.addEventListener("change", reconstruct);
    at("again").addEventListener("click", () => { mask += 1; reconstruct(); });
  }

  function showAbout() {
    const trained = [about.method, about.model].filter(Boolean).join(" ");
    const step = about.step === null ? "" : `, step ${count(about.step)}`;
    at("title").textContent = `Try ${about.title}`;
    document.title = `Try ${about.title}`;
    at("subject").textContent = `${trained}${step}, for images of ${about.size} pixels`;
    at("limits").textContent = "A copied image can be pasted with Ctrl+V. JPEG, PNG, WebP, GIF or BMP of at most " +
      `${(about.max_bytes / 2 ** 20).toLocaleString("en")} MiB and ${count(about.max_pixels / 1e6)} million pixels; ` +
      "nothing is stored.";
    if (about.reconstruction) {
      const { least, most, own } = about.reconstruction;
      const inside = { min: Math.ceil(100 * least) / 100, max: Math.floor(100 * most) / 100, step: 0.01 };
      Object.assign(at("ratio"), { ...inside, value: own === null ? 0.75 : own });
      showRatio();
    }
    showExamples();
  }

  async function begin() {
    listen();
    try {
      about = await ask("api/about");
      showAbout();
    } catch (error) {
      complain(error);
    }
  }

  begin();
})();
