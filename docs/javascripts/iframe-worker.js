// Browsers refuse workers on pages that were opened from the disk, and the search runs in one. There, a worker is a
// hidden frame: the script runs in it, and messages are handed over as events.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.document.open();
      inside.document.write("<!doctype html><title>search</title>");
      inside.document.close();
      inside.postMessage = (data) => this.#hand(this, data);
      const script = inside.document.createElement("script");
      this.ready = new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
      });
      script.src = url;
      inside.document.body.append(script);
      this.frame = frame;
    }

    postMessage(data) {
      this.ready.then(() => this.#hand(this.frame.contentWindow, data));
    }

    terminate() {
      this.frame.remove();
    }

    #hand(target, data) {
      const event = new MessageEvent("message", { data });
      target.dispatchEvent(event);
      if (target === this && this.onmessage) this.onmessage(event);
    }
  }
  window.Worker = FrameWorker;
}
