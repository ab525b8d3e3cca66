// Browsers refuse workers to pages that were opened as files. Then a hidden frame does a worker's work: the search.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const outer = this
      const frame = Object.assign(document.createElement("iframe"), { hidden: true })
      document.body.append(frame)
      const inner = frame.contentWindow
      const send = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }))
      const load = (src) =>
        new Promise((resolve, reject) => {
          const script = inner.document.createElement("script")
          Object.assign(script, { src, onload: resolve, onerror: reject })
          inner.document.body.append(script)
        })
      inner.postMessage = (data) => setTimeout(() => { send(outer, data); outer.onmessage?.({ data }) })
      inner.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => load(src)), Promise.resolve())
      const ready = load(new URL(url, location))
      this.postMessage = (data) => ready.then(() => send(inner, data))
      this.terminate = () => frame.remove()
    }
  }
}
