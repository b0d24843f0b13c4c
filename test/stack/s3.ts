// S3: versitygw, a real S3 server over a folder.
import { endpoint } from "./env.ts";
import { goProgram } from "./go.ts";
import { answers } from "./process.ts";
import { type Part, stackPath } from "./stack.ts";

const versitygw = {
  path: "github.com/versity/versitygw",
  version: "v1.8.0",
  sum: "h1:au+wI+aybno/STsQiSm35Uu6Q6iK5MWReQxgO6SEMFc=",
};
const health = "/health"; // so no bucket can have this name

export const s3: Part = {
  name: "s3",
  variable: "S3_ENDPOINT",
  installs: [goProgram("versitygw", versitygw)],
  command: (env, folder) => {
    const { host, port } = endpoint(env.S3_ENDPOINT ?? "");
    const server = [`--port=${host}:${port}`, `--region=${env.AWS_REGION}`, `--health=${health}`];
    return {
      command: stackPath("bin", "versitygw"),
      // ETags and metadata are in extended attributes. Its --sidecar, which needs none, mixes those of an object's versions.
      args: [...server, "--keep-alive", "--quiet", "posix", folder],
      env: { ROOT_ACCESS_KEY_ID: env.AWS_ACCESS_KEY_ID, ROOT_SECRET_ACCESS_KEY: env.AWS_SECRET_ACCESS_KEY },
    };
  },
  ready: (env) => answers(`${env.S3_ENDPOINT}${health}`),
};
