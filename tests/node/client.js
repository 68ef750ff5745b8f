// Streams one completion, then starts another and cancels it after three tokens. Prints what happened as JSON.
// usage: node client.js PROTO_DIRECTORY ADDRESS
"use strict";

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address] = process.argv.slice(2);
const definition = loader.loadSync(path.join("cutaway", "v1", "inference.proto"), {
  includeDirs: [protos],
  longs: Number,
  oneofs: true,
  defaults: true,
});
const { Inference } = grpc.loadPackageDefinition(definition).cutaway.v1;
const client = new Inference(address, grpc.credentials.createInsecure());

function generate(request, cancelAfter) {
  return new Promise((resolve) => {
    const seen = { events: [], tokens: [], text: "", code: grpc.status.OK, finished: null };
    const call = client.Generate(request);
    call.on("data", (message) => {
      seen.events.push(message.event);
      if (message.event === "delta") {
        seen.tokens.push(...message.delta.tokens.map((token) => token.id));
        seen.text += message.delta.text;
      }
      if (message.event === "finished") seen.finished = message.finished;
      if (seen.tokens.length >= cancelAfter) call.cancel();
    });
    call.on("error", (error) => { seen.code = error.code; });
    call.on("close", () => resolve(seen));
    call.on("end", () => resolve(seen));
  });
}

async function main() {
  const sampling = { temperature: 0, ignoreEos: true };
  const prompt = { tokenIds: { ids: [40, 41, 42, 43] } };
  const streamed = await generate({ ...prompt, sampling: { ...sampling, maxTokens: 16 } }, Infinity);
  const cancelled = await generate({ ...prompt, sampling }, 3);
  console.log(JSON.stringify({ streamed, cancelled }));
  client.close();
}

main();
